"""A worker that tells about itself: health for probes, metrics for Prometheus, log lines that name their task."""
