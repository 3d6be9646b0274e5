"""What baselines are fitted with: small models and their training, policies."""
