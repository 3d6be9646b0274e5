"""The question side: what is asked, what counts as right. Loads no torch."""
