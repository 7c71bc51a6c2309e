"""A shop that ships what is ordered, and nothing else: the transactional outbox with SQLAlchemy."""
