"""Complete a few prompts.

python example.py                                 uses the small model that ships with nano-vLLM
python example.py --model ~/models/Qwen3-0.6B --prompt "What is a KV cache?"
"""

import argparse
from time import perf_counter

from nanovllm import LLM, SamplingParams, demo_model

PROMPTS = [  # the demo model was trained on Python's standard library, and little else
    "class Stack:\n",
    "def connect(host, port):\n",
    "def load(file):\n",
    "import os\nimport sys\n\n",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a hub id")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6)
    args = parser.parse_args()
    prompts = args.prompt or PROMPTS
    sampling_params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)

    with LLM(args.model or demo_model()) as llm:
        tokenizer = llm.get_tokenizer()
        inputs = prompts
        if tokenizer.chat_template:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        start = perf_counter()
        outputs = llm.generate(inputs, sampling_params)
        seconds = perf_counter() - start

    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"\n── prompt {'─' * 70}\n{prompt}\n── completion {'─' * 66}\n{output['text']}")
    num_tokens = sum(len(output["token_ids"]) for output in outputs)
    print(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tok/s")


if __name__ == "__main__":
    main()
