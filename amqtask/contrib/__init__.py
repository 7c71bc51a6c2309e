"""Edges to other libraries; nothing imports them but whoever uses those libraries. Django's is a package, each other a module."""
