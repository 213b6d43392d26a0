"""The callbacks of the training loop, one concern a file; see `base.Callback`."""
