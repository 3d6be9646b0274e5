"""Teacher-forced training of the routers on features of the frozen model."""
