"""What baselines are fitted with: measures, small models and their training, policies."""
