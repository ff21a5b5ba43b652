"""What /v1/responses answers and remembers: the items of the output, their events, and the store."""

import itertools
import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from response_checks import CALL, WEATHER, message, post, replay, stream, without_ids
from scripted import ScriptedServer

from nanovllm.server.errors import ApiError
from nanovllm.server.parsing.pieces import CallArguments, CallBegin, Content, Piece, Reasoning
from nanovllm.server.response_fields import is_json_object
from nanovllm.server.response_items import OutputItems
from nanovllm.server.response_store import ResponseStore, StoredResponse


class TestAnswers:
    SAID = (
        "<think>\n",
        "hm ",
        "hm",
        "\n</think>\n\n",
        "I ",
        "look.",
        "\n",
        CALL[:20],
        CALL[20:60],
        CALL[60:],
        "\n",
        CALL,
    )

    def test_reasoning_text_and_calls_are_items(self, scripted: ScriptedServer) -> None:
        scripted.say(*self.SAID)
        body = post(scripted, tools=[WEATHER])
        reasoning, text, *calls = body["output"]
        assert without_ids([reasoning]) == [{
            "type": "reasoning", "status": "completed", "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm hm"}],
        }]  # fmt: skip
        assert without_ids([text]) == [message("I look.")]
        assert [call["arguments"] for call in calls] == ['{"location": "Rome"}'] * 2
        assert len({call["call_id"] for call in calls}) == 2
        num_reasoning = len(scripted.state.llm.tokenizer.encode("hm hm"))
        assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": num_reasoning}
        assert body["usage"]["input_tokens_details"]["cached_tokens"] == scripted.num_cached
        _, streamed = stream(scripted, tools=[WEATHER])
        assert without_ids(streamed["output"]) == without_ids(body["output"])
        assert streamed["usage"] == body["usage"]

    def test_events_add_up_to_the_items(self, scripted: ScriptedServer) -> None:
        scripted.say(*self.SAID)
        events, body = stream(scripted, tools=[WEATHER], include=["message.output_text.logprobs"])
        assert replay(events) == body["output"]
        assert {event["type"] for event in events} >= {"response.reasoning_text.delta", "response.reasoning_text.done"}

    def test_a_single_call_is_given_if_no_more_are_wanted(self, scripted: ScriptedServer) -> None:
        scripted.say(*self.SAID)
        for body in (
            post(scripted, tools=[WEATHER], parallel_tool_calls=False),
            stream(scripted, tools=[WEATHER], parallel_tool_calls=False)[1],
        ):
            assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]

    def test_logprobs_are_of_the_tokens_up_to_the_texts_end(self, scripted: ScriptedServer) -> None:
        scripted.say("<think>", "hm", "</think>", "I ", "look.", "")
        asked = {"include": ["message.output_text.logprobs"]}
        for body in (post(scripted, **asked), stream(scripted, **asked)[1]):
            logprobs = body["output"][-1]["content"][0]["logprobs"]
            assert [entry["token"] for entry in logprobs] == ["<think>", "hm", "</think>", "I ", "look.", ""]

    def test_an_answer_that_is_cut_short_is_incomplete(self, scripted: ScriptedServer) -> None:
        scripted.say("Hel", "lo", end="length")
        for body in (post(scripted), stream(scripted)[1]):
            assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
            assert without_ids(body["output"]) == [message("Hello", "incomplete")]
            assert body["completed_at"] is None

    def test_a_call_that_is_cut_short_is_left_out_when_the_conversation_goes_on(self, scripted: ScriptedServer) -> None:
        scripted.say("Well.", CALL[:60], CALL[60:66], end="length")
        _, body = stream(scripted, tools=[WEATHER])
        assert [item["status"] for item in body["output"]] == ["completed", "incomplete"]
        post(scripted, previous_response_id=body["id"], input="Go on.")
        assert scripted.prompts[-1].endswith("assistant: Well.\nuser: Go on.\nassistant:")

    def test_an_answer_without_text_is_an_empty_message(self, scripted: ScriptedServer) -> None:
        scripted.say("")
        assert without_ids(post(scripted)["output"]) == without_ids(stream(scripted)[1]["output"]) == [message("")]

    @pytest.mark.parametrize("end", ["error", "abort"])
    def test_an_answer_that_fails_says_why(self, scripted: ScriptedServer, end: str) -> None:
        scripted.say("Hel", "lo", end=end, because="the logits are NaN")
        for body in (post(scripted), stream(scripted)[1]):
            assert body["status"] == "failed" and "NaN" in body["error"]["message"]
            assert scripted.http.get(f"/v1/responses/{body['id']}").status_code == 404

    def test_an_engine_that_fails_meanwhile_is_an_error_and_a_failed_response(self, scripted: ScriptedServer) -> None:
        scripted.say("Hel", "lo", failure=RuntimeError("secret"))
        events, body = stream(scripted)
        assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
        assert events[-2]["error"]["type"] == "server_error" and body["error"]["code"] == "server_error"
        assert "secret" not in json.dumps(events)
        with pytest.raises(openai.APIError, match="log"):
            list(scripted.openai.responses.create(model="demo", input="x", stream=True))
        with pytest.raises(openai.InternalServerError):
            scripted.openai.responses.create(model="demo", input="x")


@st.composite
def answers(draw: st.DrawFn) -> list[Piece]:
    """An answer's pieces, whose calls may break off."""
    text = st.text('ab"{\\\n\u00e9\U0001f600', min_size=1, max_size=5)
    pieces: list[Piece] = []
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from([Reasoning, Content, CallBegin]), max_size=6)):
        if kind is not CallBegin:
            pieces += [kind(part) for part in draw(st.lists(text, min_size=1, max_size=3))]
            continue
        pieces.append(CallBegin(num_calls, f"call_{num_calls}", "f"))
        arguments = json.dumps(draw(st.dictionaries(text, st.integers(), max_size=2)))
        cuts = sorted(draw(st.lists(st.integers(0, len(arguments)), max_size=3)))
        parts = [arguments[a:b] for a, b in itertools.pairwise([0, *cuts, draw(st.just(len(arguments)) | st.just(1))])]
        pieces += [CallArguments(num_calls, part) for part in parts if part]
        num_calls += 1
    return pieces


@given(pieces=answers(), is_complete=st.booleans())
def test_events_add_up_to_the_items_of_any_answer(pieces: list[Piece], is_complete: bool) -> None:
    output = OutputItems()
    events = [event for piece in pieces for event in output.add(piece)] + output.end(is_complete)
    assert replay(json.loads(json.dumps(events))) == output.items
    texts = {"message": "", "reasoning": "", "function_call": ""}
    for item in output.items:
        texts[item["type"]] += item["arguments"] if "arguments" in item else item["content"][0]["text"]
    assert texts["message"] == "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert texts["reasoning"] == "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    assert texts["function_call"] == "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    assert sum(item["type"] == "function_call" for item in output.items) == len(
        [piece for piece in pieces if isinstance(piece, CallBegin)]
    )
    for item in output.items[:-1]:
        assert item["status"] == ("completed" if is_json_object(item.get("arguments", "{}")) else "incomplete")
    assert output.items[-1]["status"] == "incomplete" or is_complete


class TestStore:
    def test_bytes_are_bounded_as_well(self) -> None:
        def stored(i: int, size: int) -> StoredResponse:
            return StoredResponse({"id": f"r{i}", "output": []}, [{"text": "x" * size}])

        store = ResponseStore(most=9, most_bytes=1000)
        for i in range(4):
            store.put(stored(i, 300))
        for i in (0, 1):
            with pytest.raises(ApiError, match=f"'r{i}' not found"):
                store.get(f"r{i}")
        assert store.get("r3").input_items == [{"text": "x" * 300}]
        store.delete("r3")
        store.put(stored(4, 300))
        assert store.get("r2") and store.get("r4")
        store.put(stored(5, 1000))
        with pytest.raises(ApiError):
            store.get("r5")
        store.put(stored(6, 300))
        assert store.get("r6")

    def test_a_response_can_be_read_again_until_it_is_deleted(self, scripted: ScriptedServer) -> None:
        client = scripted.openai.responses
        made = client.create(model="demo", input="x")
        assert client.retrieve(made.id) == made
        client.delete(made.id)
        for call in (client.retrieve, client.delete, client.input_items.list):
            with pytest.raises(openai.NotFoundError, match=made.id):
                call(made.id)

    def test_a_stream_is_stored_too(self, scripted: ScriptedServer) -> None:
        _, body = stream(scripted)
        assert scripted.http.get(f"/v1/responses/{body['id']}").json() == body

    def test_what_is_not_to_be_stored_is_not(self, scripted: ScriptedServer) -> None:
        made = post(scripted, store=False)
        with pytest.raises(openai.NotFoundError, match=made["id"]):
            scripted.openai.responses.create(model="demo", input="x", previous_response_id=made["id"])

    def test_the_oldest_is_forgotten_but_not_by_those_that_go_on_from_it(self, scripted: ScriptedServer) -> None:
        first = post(scripted, input="First.")
        second = post(scripted, input="Second.", previous_response_id=first["id"])
        for _ in range(scripted.settings.limits.stored_responses - 1):
            post(scripted)
        with pytest.raises(openai.NotFoundError, match=first["id"]):
            scripted.openai.responses.create(model="demo", input="x", previous_response_id=first["id"])
        post(scripted, input="Third.", previous_response_id=second["id"])
        assert scripted.prompts[-1].startswith("user: First.\nassistant: Hello.\nuser: Second.\n")

    def test_input_items_come_in_pages(self, scripted: ScriptedServer) -> None:
        first = scripted.openai.responses.create(
            model="demo", input=[{"role": "user", "content": f"{i}"} for i in range(4)]
        )
        made = scripted.openai.responses.create(model="demo", input="x", previous_response_id=first.id)
        items = scripted.openai.responses.input_items
        ascending = list(items.list(made.id, order="asc", limit=2))
        assert [item.content[0].text for item in ascending] == ["0", "1", "2", "3", "Hello.", "x"]
        assert ascending[4].id == first.output[0].id
        assert list(items.list(made.id, limit=4)) == ascending[::-1]
        page = items.list(made.id, order="asc", limit=2, after=ascending[3].id)
        assert (page.data, page.has_more) == (ascending[4:], False)
        for wrong, error in ({"limit": 101}, openai.BadRequestError), ({"after": "msg_0"}, openai.NotFoundError):
            with pytest.raises(error, match=next(iter(wrong))):
                items.list(made.id, **wrong)
