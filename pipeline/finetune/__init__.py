"""Fine-tuning and evaluation on SQuAD- and GLUE-format tasks."""
