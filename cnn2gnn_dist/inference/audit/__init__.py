"""What is wrong with a training set, by its own graph: the scores, the findings of a whole set, the files of them."""
