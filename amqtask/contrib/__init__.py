"""Edges to other libraries; nothing imports them but whoever uses those libraries."""
