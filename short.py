
def reward(example, text):
    return 1.0 if 0 < len(text.split()) <= 12 else 0.0
