"""What the training loop calls, one concern a file; see `base.Callback`."""
