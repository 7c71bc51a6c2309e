"""Alerts: what is watched (rules, facts), what fired (the index), who is told (destinations); `watch` puts it together."""
