"""`nanovllm serve`: an HTTP server for the clients of OpenAI, Anthropic and vLLM."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from nanovllm.commands.options import engine_options
from nanovllm.commands.shared import fail, model_and_options, usage_errors

_LIMITS = "Bounds of a request"


@engine_options
def serve(
    model: Annotated[str | None, typer.Argument(help="A directory, a GGUF file, or a hub id.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="A name that requests may give; may be repeated. Default: MODEL.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Clients must send it; may be repeated. Default: $NANOVLLM_API_KEY.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja template, or a file with one, instead of the model's.")
    ] = None,
    reasoning_parser: Annotated[
        str, typer.Option(help="How to tell reasoning from answer: qwen3, deepseek_r1, mistral, auto or none.")
    ] = "auto",
    tool_call_parser: Annotated[
        str, typer.Option(help="The form of tool calls: hermes, llama3_json, mistral, auto or none.")
    ] = "auto",
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Browsers' pages from there may call (CORS); may be repeated.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="With --ssl-certfile: serve HTTPS.")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="See --ssl-keyfile.")] = None,
    drain_timeout_s: Annotated[
        float, typer.Option(help="How long SIGTERM waits for running requests. A second signal ends at once.")
    ] = 30.0,
    max_queue: Annotated[
        int, typer.Option(help="Completions beyond --max-num-seqs; then 429.", rich_help_panel=_LIMITS)
    ] = 1024,
    max_body_bytes: Annotated[int, typer.Option(help="Then 413.", rich_help_panel=_LIMITS)] = 16 << 20,
    data_parallel_size: Annotated[
        int,
        typer.Option(
            "--data-parallel-size",
            "-dp",
            min=1,
            max=256,
            help="Engines behind the port, each with --tensor-parallel-size devices; requests that begin alike meet.",
        ),
    ] = 1,
    page: Annotated[bool, typer.Option(help="Show the engine at work, to a browser, at /.")] = True,
    teach: Annotated[
        bool,
        typer.Option(
            help="An engine to look at: the page can pause, step and load it. Its cache and its steps are small, "
            "unless options say otherwise."
        ),
    ] = False,
    log_requests: Annotated[bool, typer.Option(help="A line for each request, without its text.")] = True,
    *,
    engine: dict[str, Any],
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/completions, /v1/chat/completions, /v1/responses and /v1/models,
    Anthropic's /v1/messages, vLLM's /tokenize, /detokenize, /health, /version and /metrics, and at / a page that shows
    the engine at work. Every parameter of `SamplingParams` is a field of the requests.

    SIGTERM or Ctrl-C finishes the running requests first, and refuses new ones.
    """
    try:
        from nanovllm.server.launch import listen
        from nanovllm.server.launch import serve as run
        from nanovllm.server.parsing.reasoning import REASONING_PARSERS
        from nanovllm.server.parsing.tool_calls import TOOL_CALL_PARSERS
        from nanovllm.server.settings import Limits, ServerSettings
        from nanovllm.trace.scenes import TEACHING
    except ModuleNotFoundError as error:
        fail(f"the server needs {error.name}: `pip install '.[serve]'` in nano-vLLM's folder")
    if (ssl_keyfile is None) != (ssl_certfile is None):
        fail("--ssl-keyfile and --ssl-certfile need each other")
    if teach and data_parallel_size > 1:
        fail(f"--teach shows one engine: it needs --data-parallel-size 1, not {data_parallel_size}")
    logging.basicConfig(level=logging.INFO if log_requests else logging.WARNING, format="%(asctime)s %(message)s")
    with usage_errors():
        settings = ServerSettings(
            served_model_names=served_model_name or [],
            api_keys=api_key or [key for key in [os.environ.get("NANOVLLM_API_KEY")] if key],
            chat_template=_template(chat_template),
            reasoning_parser=_parser("reasoning_parser", reasoning_parser, REASONING_PARSERS),
            tool_call_parser=_parser("tool_call_parser", tool_call_parser, TOOL_CALL_PARSERS),
            allowed_origins=allowed_origin or [],
            drain_timeout_s=drain_timeout_s,
            page=page,
            teach=teach,
            limits=Limits(queue=max_queue, body_bytes=max_body_bytes),
        )
        ssl = {"ssl_keyfile": str(ssl_keyfile), "ssl_certfile": str(ssl_certfile)} if ssl_keyfile else None
        listener = listen(host, port)
        with listener:
            path, options = model_and_options(model, engine)
            if teach:
                without = {"num_kvcache_blocks"} if "kvcache_memory_bytes" in options else set()
                options = {name: value for name, value in TEACHING.items() if name not in without} | options
            if model is None and not settings.served_model_names:
                settings.served_model_names = [Path(path).stem]
            run(path, options, settings, listener, ssl, data_parallel_size)


def _parser(option: str, name: str, known: dict[str, Any]) -> str | None:
    if name not in ("auto", "none", *known):
        raise ValueError(f"{option}={name!r} must be one of {', '.join(known)}, auto or none")
    return None if name == "none" else name


def _template(given: str | None) -> str | None:
    """The template itself; `given` may be its file's name."""
    if given is None or "{" in given:
        return given
    return Path(given).read_text(encoding="utf-8")
