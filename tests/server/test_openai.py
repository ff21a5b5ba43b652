"""OpenAI's client gets from a server what it expects of OpenAI's."""

import json
from collections import defaultdict

import jsonschema
import openai
import pytest
from server_process import KEY, Server

from nanovllm import LLM, SamplingParams, demo_model

PROMPT = "def add(a, b):\n    return"
MESSAGES = [{"role": "user", "content": "import os\n"}]
GREEDY = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> LLM:
    with LLM(demo_model(), device="cpu", dtype="float32", num_kvcache_blocks=64) as llm:
        yield llm


class TestCompletions:
    def test_text_is_what_the_engine_answers(self, client: openai.OpenAI, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=12)
        (expected,) = llm.generate([PROMPT], params, use_tqdm=False)
        answer = client.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (expected["text"], expected["finish_reason"])
        assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
        assert answer.usage.completion_tokens == len(expected["token_ids"])
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert (answer.model, answer.object) == ("demo", "text_completion")

    def test_a_stream_adds_up_to_the_answer(self, client: openai.OpenAI) -> None:
        asked = {"prompt": PROMPT, "max_tokens": 12, **GREEDY}
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        *texts, usage = chunks
        assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
        assert [chunk.choices[0].finish_reason for chunk in texts][-1] == whole.choices[0].finish_reason
        assert len(texts) > 3 and all(chunk.usage is None for chunk in texts)
        assert usage.choices == [] and usage.usage.completion_tokens == whole.usage.completion_tokens
        assert len({chunk.id for chunk in chunks}) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_prompts_of_every_form_get_n_choices_each(self, client: openai.OpenAI, llm: LLM, stream: bool) -> None:
        ids = llm.get_tokenizer().encode(PROMPT)
        for prompt, number in ((PROMPT, 1), (ids, 1), ([PROMPT, "x ="], 2), ([ids, ids, ids], 3)):
            asked = {"model": "demo", "prompt": prompt, "n": 2, "max_tokens": 3, "seed": 5, "stream": stream}
            answer = client.completions.create(**asked)
            texts: dict[int, str] = defaultdict(str)
            for choice in [c for chunk in answer for c in chunk.choices] if stream else answer.choices:
                texts[choice.index] += choice.text
            assert sorted(texts) == list(range(2 * number))
            if number == 3:
                assert [texts[i] for i in (0, 1)] == [texts[i] for i in (2, 3)] == [texts[i] for i in (4, 5)]

    def test_echo_with_logprobs_scores_the_prompt(self, client: openai.OpenAI, llm: LLM) -> None:
        """As lm-eval's local-completions asks: token ids, echo, one token more, or none."""
        ids = llm.get_tokenizer().encode(PROMPT)
        (expected,) = llm.generate(
            [ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False
        )
        scores = [of_token[i].logprob for i, of_token in zip(ids[1:], expected.prompt_logprobs[1:], strict=True)]
        for max_tokens in (1, 0):
            asked = {"prompt": [ids], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "seed": 1}
            (choice,) = client.completions.create(**asked, **GREEDY).choices
            values = choice.logprobs
            assert len(values.tokens) == len(values.token_logprobs) == len(values.top_logprobs) == len(ids) + max_tokens
            assert values.token_logprobs[0] is None
            assert values.token_logprobs[1 : len(ids)] == pytest.approx(scores, abs=1e-5)
            for score, top in zip(values.token_logprobs[1:], values.top_logprobs[1:], strict=True):
                assert max(top.values()) >= score
            assert choice.text.startswith(PROMPT) and (choice.text == PROMPT) is (max_tokens == 0)
            assert "".join(values.tokens[: len(ids)]) == PROMPT
            for token, offset in zip(values.tokens, values.text_offset, strict=True):
                assert choice.text[offset : offset + len(token)] == token

    def test_vllms_further_fields_are_taken(self, client: openai.OpenAI, llm: LLM) -> None:
        token = llm.get_tokenizer().encode("x")[0]
        more = {"allowed_token_ids": [token], "min_tokens": 4, "return_token_ids": True, "ignore_eos": True}
        (choice,) = client.completions.create(prompt=PROMPT, max_tokens=4, extra_body=more, **GREEDY).choices
        assert choice.token_ids == [token] * 4

    def test_stop_strings_end_it(self, client: openai.OpenAI) -> None:
        whole = client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY).choices[0].text
        stop = whole[3:6]
        (choice,) = client.completions.create(prompt=PROMPT, max_tokens=20, stop=[stop], **GREEDY).choices
        assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"

    def test_tokens_from_the_cache_are_counted(self, client: openai.OpenAI) -> None:
        prompt = list(range(300, 500))
        for expected in (0, 192):  # whole blocks of 64
            usage = client.completions.create(prompt=prompt, max_tokens=1, **GREEDY).usage
            assert usage.prompt_tokens_details.cached_tokens == expected


class TestChat:
    def test_an_answer_and_its_stream_are_the_same(self, client: openai.OpenAI) -> None:
        asked = {"messages": MESSAGES, "max_completion_tokens": 10, **GREEDY}
        whole = client.chat.completions.create(**asked)
        (choice,) = whole.choices
        assert choice.message.role == "assistant" and choice.finish_reason == "length" and choice.message.content
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_the_prompt_is_what_the_template_writes(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(messages=MESSAGES, max_tokens=5, **GREEDY)
        raw = client.completions.create(prompt="# user\nimport os\n\n# a\n", max_tokens=5, **GREEDY)
        assert answer.choices[0].message.content == raw.choices[0].text
        assert answer.usage.prompt_tokens == raw.usage.prompt_tokens

    def test_logprobs_are_of_each_token(self, client: openai.OpenAI) -> None:
        asked = {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 3, **GREEDY}
        (choice,) = client.chat.completions.create(**asked).choices
        assert len(choice.logprobs.content) == 4
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob
            assert bytes(entry.bytes).decode() == entry.token
        chunks = client.chat.completions.create(**asked, stream=True)
        streamed = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
        assert streamed == choice.logprobs.content

    def test_n_answers_have_an_index_each(self, client: openai.OpenAI) -> None:
        asked = {"model": "demo", "messages": MESSAGES, "n": 3, "max_tokens": 6, "seed": 1}
        whole = {c.index: c.message.content for c in client.chat.completions.create(**asked).choices}
        texts: dict[int, str] = defaultdict(str)
        for chunk in client.chat.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == whole and len(set(whole.values())) > 1


class TestStructuredOutput:
    SCHEMA = {
        "type": "object",
        "properties": {"name": {"enum": ["ab", "cd"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }

    @pytest.mark.parametrize("stream", [False, True])
    def test_response_format_holds_the_answer_to_its_schema(self, client: openai.OpenAI, stream: bool) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": self.SCHEMA, "strict": True}}
        for seed in range(3):
            asked = {"model": "demo", "messages": MESSAGES, "response_format": form, "seed": seed, "max_tokens": 100}
            answer = client.chat.completions.create(**asked, stream=stream)
            if stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            else:
                text = answer.choices[0].message.content
            jsonschema.validate(json.loads(text), self.SCHEMA)

    def test_vllms_fields_do_too(self, client: openai.OpenAI) -> None:
        for more in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"regex": "yes|no"}}):
            answer = client.completions.create(model="demo", prompt="x", max_tokens=9, extra_body=more)
            assert answer.choices[0].text in ("yes", "no")

    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
    def test_a_forced_call_has_arguments_of_the_functions_schema(self, client: openai.OpenAI, choice) -> None:
        """The model writes Python, and would never call a function by itself."""
        tools = [{"type": "function", "function": {"name": "add", "parameters": self.SCHEMA}}]
        asked = {"model": "demo", "messages": MESSAGES, "tools": tools, "tool_choice": choice, "max_tokens": 100}
        message = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), self.SCHEMA)

    @pytest.mark.parametrize(
        "more",
        [{"guided_regex": "("}, {"guided_json": {"type": "nothing"}}, {"guided_regex": "a", "guided_choice": ["a"]}],
    )
    def test_what_cannot_be_held_is_a_bad_request(self, client: openai.OpenAI, more: dict) -> None:
        with pytest.raises(openai.BadRequestError, match="guided|structured_outputs"):
            client.completions.create(model="demo", prompt="x", extra_body=more)


class TestModelsAndTokens:
    def test_the_models_are_the_served_names(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["demo", "other-name"]
        assert client.models.retrieve("other-name").id == "other-name"
        assert client.completions.create(model="other-name", prompt="x", max_tokens=1).model == "demo"

    def test_tokenize_and_detokenize_are_the_tokenizers(self, http, llm: LLM) -> None:
        body = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
        assert body["tokens"] == llm.get_tokenizer().encode(PROMPT)
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["max_model_len"] == 2048
        assert http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": PROMPT}
        for special in (True, False):  # this tokenizer adds none
            more = http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": special}).json()
            assert more["tokens"] == body["tokens"]
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert (
            http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == "# user\nimport os\n\n# a\n"
        )

    def test_metrics_have_vllms_names_and_count(self, server: Server, client: openai.OpenAI) -> None:
        names = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total")
        before = [server.metric(name) for name in names]
        client.completions.create(prompt=[5, 6, 7], max_tokens=9, extra_body={"ignore_eos": True}, **GREEDY)
        assert [server.metric(name) - value for name, value in zip(names, before, strict=True)] == [9, 3, 1]
        assert server.metric("vllm:time_to_first_token_seconds_count") > 0

    def test_health_and_version_need_no_key(self, server: Server) -> None:
        import httpx

        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/version").json()["version"]


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"temperature": -1}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"n": 1000}, "n: 1000"),
            ({"logprobs": 99}, "logprobs"),
            ({"stop": ["a"] * 99}, "stop"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [10**6]}, "1000000"),
            ({"prompt": "x " * 5000}, "2048"),
            ({"prompt": None}, "prompt"),
            ({"suffix": "x"}, "suffix"),
            ({"best_of": 4}, "best_of"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"logit_bias": {"5": 200}}, "logit_bias"),
            ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
            ({"extra_body": {"add_special_tokens": False}}, "add_special_tokens"),
            ({"extra_body": {"top_k": "many"}}, "top_k"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_bad_parameter_is_a_bad_request_that_names_it(
        self, client: openai.OpenAI, change: dict, message: str, stream: bool
    ) -> None:
        if stream and "stream_options" in change:
            pytest.skip("allowed with stream")
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            client.completions.create(**{"model": "demo", "prompt": "x", "stream": stream, **change})
        assert caught.value.body["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"content": "no role"}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
            ({"top_logprobs": 3}, "top_logprobs"),
            ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "name"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ],
    )
    def test_so_is_a_bad_conversation(self, client: openai.OpenAI, change: dict, message: str) -> None:
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, **change})

    def test_another_model_is_not_found(self, client: openai.OpenAI) -> None:
        for call in (lambda: client.completions.create(model="gpt", prompt="x"), lambda: client.models.retrieve("gpt")):
            with pytest.raises(openai.NotFoundError, match="gpt"):
                call()

    @pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY[:-1]])
    def test_a_wrong_key_is_refused(self, server: Server, key: str) -> None:
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key=key).models.list()
