"""The worker: consumer, strategy, dispatch, acknowledgements, shutdown."""
