"""UniLMSeq2Seq: a masked BERT becomes a sequence-to-sequence model by its attention mask."""
