"""What routing gains: systems compared on the same questions, with intervals."""
