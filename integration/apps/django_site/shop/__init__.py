"""An application with tasks, named in INSTALLED_APPS by its AppConfig."""
