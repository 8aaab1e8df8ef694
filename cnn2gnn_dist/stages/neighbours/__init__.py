"""The student's neighborhood: embeddings, candidate versions, live search, second hop."""
