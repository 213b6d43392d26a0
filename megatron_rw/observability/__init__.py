"""The settings of a run's metrics, and the endpoint that serves them to Prometheus."""
