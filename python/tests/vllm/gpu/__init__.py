"""What the connector costs and saves on a GPU: one sitting, every limit measured in it."""
