"""Pictures of token groups, scores and predictions."""
