"""What a server is told besides the engine's options, checked before anything is loaded."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Limits:
    """What one request may ask for; more is refused with status 400, or the status given. All are at least 1."""

    body_bytes: int = 16 << 20  # 413
    json_depth: int = 64
    body_timeout_s: int = 30  # to send headers and body; 408
    header_bytes: int = 64 << 10  # 431
    prompts: int = 1024
    n: int = 128
    logprobs: int = 20
    stop_strings: int = 16
    tools: int = 128
    queue: int = 1024  # completions that wait or run beyond max_num_seqs; 429
    stored_responses: int = 1024  # the oldest are forgotten

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")


@dataclass(slots=True, kw_only=True)
class ServerSettings:
    """The options of a server. Names and meanings are vLLM's.

    Args:
        served_model_names: names that requests may give; the first is the one that answers give. Empty: the model's.
        api_keys: keys that clients must send; empty: none.
        chat_template: a Jinja template instead of the tokenizer's.
        reasoning_parser: how to tell reasoning from answer: a name, "auto" (by the chat template) or None.
        tool_call_parser: the form of the model's tool calls: a name, "auto" (by the chat template) or None.
        allowed_origins: of browsers' pages (CORS); empty: none.
        drain_timeout_s: how long a server that was told to end waits for its requests.
        page: show the engine at work at GET /.
        teach: let the page pause and steer the engine, and trace every step. For an engine that serves nobody else.
        ping_interval_s: seconds without an event after which a stream of /v1/messages gets a ping.
    """

    served_model_names: list[str] = field(default_factory=list)
    api_keys: list[str] = field(default_factory=list)
    chat_template: str | None = None
    reasoning_parser: str | None = "auto"
    tool_call_parser: str | None = "auto"
    allowed_origins: list[str] = field(default_factory=list)
    drain_timeout_s: float = 30.0
    ping_interval_s: float = 10.0
    page: bool = True
    teach: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if any(not key for key in self.api_keys):
            raise ValueError("api_key must not be empty")
        if self.teach and not self.page:
            raise ValueError("teach=True needs the page, and page=False leaves it out")
        for name in ("drain_timeout_s", "ping_interval_s"):
            if not 0 <= getattr(self, name) <= 86400:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number of seconds in [0, 86400]")
