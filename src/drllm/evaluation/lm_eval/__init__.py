"""lm-evaluation-harness: our model in it, its tasks for us. Nothing else imports `lm_eval`."""
