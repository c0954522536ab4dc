"""vLLM's own tests of connectors, with this project's connector in them."""
