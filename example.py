"""Ask a model a few questions, and read its answers as it writes them.

python example.py                                 SmolLM2-135M, which `make setup` installs; without it the model
                                                  that ships with nano-vLLM, which completes Python
python example.py --model ~/models/Qwen3-0.6B --prompt "What is a KV cache?"
"""

import argparse
from time import perf_counter

from nanovllm import LLM, RequestOutputKind, SamplingParams, chat_model, demo_model

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "What is 2 + 2?",
    "Write a haiku about the sea.",
]
BEGINNINGS = [  # the demo model was trained on Python's standard library, and little else
    "class Stack:\n",
    "def connect(host, port):\n",
    "def load(file):\n",
    "import os\nimport sys\n\n",
]


def model_that_is_here() -> str:
    try:
        return chat_model()
    except FileNotFoundError as error:
        print(f"Using the small model in the package: {error}")
        return demo_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory, a GGUF file or a hub id")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    params = SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, output_kind=RequestOutputKind.DELTA
    )

    num_tokens = 0
    with LLM(args.model or model_that_is_here()) as llm:
        tokenizer = llm.get_tokenizer()
        start = perf_counter()
        for prompt in args.prompt or (QUESTIONS if tokenizer.chat_template else BEGINNINGS):
            print(f"\n── {prompt}", flush=True)
            tokens = tokenizer.encode(prompt)
            if tokenizer.chat_template:
                chat = [{"role": "user", "content": prompt}]
                tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for output in llm.stream(tokens, params):
                print(output.outputs[0].text, end="", flush=True)
                num_tokens += len(output.outputs[0].token_ids)
            print()
        seconds = perf_counter() - start
    print(f"\n{num_tokens} tokens in {seconds:.2f} s, one answer at a time: {num_tokens / seconds:.0f} tok/s")


if __name__ == "__main__":
    main()
