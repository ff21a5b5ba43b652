"""An HTTP server for the clients of OpenAI, Anthropic and vLLM: `nanovllm serve`."""
