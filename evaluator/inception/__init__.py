"""The Inception network of ADM's evaluator: its frozen graph, read without TensorFlow or run by it."""
