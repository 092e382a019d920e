"""A row to a document, and documents to ids."""
