"""A fixed path written as an ordinary checkpoint."""
