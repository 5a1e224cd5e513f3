"""The Inception network of ADM's evaluator: its frozen TensorFlow graph, read without TensorFlow or run by it."""
