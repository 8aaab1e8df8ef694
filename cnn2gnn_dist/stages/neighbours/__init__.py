"""The student's neighbourhood: embeddings, candidate versions, live search, second hop."""
