"""What a request, or the command that starts the server, must look like. Each check raises
ValueError (SystemExit for the command) with one line that says what is wrong."""
import json
import math
import socket
import sys
from functools import lru_cache
from pathlib import Path

MAX_LOGPROBS = 20
MAX_PROMPTS = 128
MAX_SCHEMA = 2**16  # characters
MAX_STOP_WORDS = 16
REPETITION_PENALTY = (0.1, 10.0)  # beyond them, products of logits overflow
MIN_TEMPERATURE = 1e-3  # below it, quotients of logits do; and the likeliest token is certain


# ---- Command line --------------------------------------------------------------------------------

def check_model(path: str) -> None:
    """`path` is a folder with a model in it."""
    if not (Path(path) / "config.json").is_file():
        sys.exit(f"{path} holds no config.json, so it is no exported model: "
                 "`python convert_to_transformers.py` makes one in Yuanmeng_Models/")


def check_template(name: str | None) -> None:
    """`--chat-template` names a JSON file, or a template that LMDeploy brings along."""
    from lmdeploy.model import MODELS

    if not name or name in MODELS.module_dict:
        return
    try:
        template = json.loads(Path(name).read_text("utf-8"))
    except OSError:
        sys.exit(f"--chat-template {name}: no such file; chat_templates.json is one")
    except ValueError as error:
        sys.exit(f"--chat-template {name}: no valid JSON ({error})")
    if not isinstance(template, dict):
        sys.exit(f"--chat-template {name}: not a JSON object; chat_templates.json shows one")


def check_port(address: str, port: int) -> None:
    """The server can listen there."""
    if not 0 < port < 65536:
        sys.exit(f"--server-port {port}: a port is a number from 1 to 65535")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        sys.exit(f"cannot listen on {address}:{port} ({error.strerror or error}): stop the other "
                 f"server, or choose another --server-port")


# ---- Chat and completion -------------------------------------------------------------------------

def fault_in_chat(request) -> str:
    """Why a chat request cannot be done as it stands, or ""."""
    for number, message in enumerate(request.messages):
        fault = fault_in_message(message)
        if fault:
            return f"messages[{number}]: {fault}"
    form = request.response_format
    if form is not None and form.type == "regex_schema" and not form.regex_schema:
        return 'response_format of type "regex_schema" needs "regex_schema"'
    return fault_in_both(request)


def fault_in_message(message: dict) -> str:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        return "a message needs a role, such as user"
    if content is None:
        calls = role == "assistant" and message.get("tool_calls")
        return "" if calls else "a message needs content"
    if isinstance(content, str):
        return ""
    if not isinstance(content, list):
        return "content must be a string or a list of parts"
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            return 'a part of content is an object such as {"type": "text", "text": "…"}'
        if kind == "text" and not isinstance(part.get("text"), str):
            return 'a part of type "text" needs a string "text"'
        if kind in ("input_audio", "file", "refusal"):
            return f"parts of type {kind} are not supported"
    return ""


def fault_in_completion(request) -> str:
    """Why a text completion cannot be done as it stands, or ""."""
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        return ("prompt must be a text that is not empty, or a list of such texts; "
                "/generate takes tokens as input_ids")
    if len(prompts) > MAX_PROMPTS:
        return f"{len(prompts)} prompts in one request; at most {MAX_PROMPTS} are possible"
    if request.stream and len(prompts) > 1:
        return "stream is for one prompt; ask for each prompt by itself"
    if request.n not in (None, 1):
        return "n must be 1; /v1/chat/completions gives several answers"
    if request.logprobs:
        return "logprobs are given by /v1/chat/completions and /generate"
    if request.echo or request.suffix:
        return "echo and suffix are not supported"
    request.n = 1
    return fault_in_both(request)


def fault_in_both(request) -> str:
    if request.presence_penalty or request.frequency_penalty:
        return ("presence_penalty and frequency_penalty are not supported; repetition_penalty is "
                "(a number above 1 makes repetition less likely)")
    if request.min_p is not None and not 0 <= request.min_p <= 1:
        return f"min_p must be between 0 and 1, not {request.min_p}"
    for name in ("max_tokens", "max_completion_tokens"):
        value = request.__dict__.get(name)  # max_tokens is deprecated, reading it would warn
        if value is not None and value < 1:
            return f"{name} must be at least 1, not {value}"
    return fault_in_stop(request.stop)


def fault_in_stop(stop: str | list[str] | None) -> str:
    words = [stop] if isinstance(stop, str) else stop or []
    if len(words) > MAX_STOP_WORDS:
        return f"{len(words)} stop words; at most {MAX_STOP_WORDS} are possible"
    return "" if all(words) else "a stop word must not be empty"


# ---- What the engine gets ------------------------------------------------------------------------

def check_input(engine, messages, input_ids: list[int] | None) -> None:
    """The prompt can be made into tokens, and tokens exist.

    Raises:
        ValueError: it cannot; a text that is certainly too long is not even tried, since that
            would take seconds in which nobody else is served.
    """
    if input_ids is not None:
        check_ids(engine, input_ids)
    texts = [messages] if isinstance(messages, str) else list(texts_of(messages))
    longest = longest_token(engine.tokenizer.model.model)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if longest and size > engine.session_len * longest:
        raise ValueError(f"a prompt of {size} bytes is longer than the model's context of "
                         f"{engine.session_len} tokens")
    template = engine.chat_template
    roles = {message.get("role") for message in messages or () if isinstance(message, dict)}
    if uses_boxes(template) and isinstance(messages, list):
        known = {"system", "user", "assistant"} | ({"tool"} if template.tool else set())
        if roles - known:
            strange = ", ".join(sorted(map(repr, roles - known)))
            raise ValueError(f"unknown role: {strange}; the chat template knows "
                             f"{', '.join(sorted(known))}")


def texts_of(messages):
    """All text in a list of messages."""
    for message in messages or ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (part["text"] for part in content
                        if isinstance(part, dict) and isinstance(part.get("text"), str))


@lru_cache(maxsize=1)
def longest_token(tokenizer) -> int:
    """Bytes of the longest token, or more; 0 if the tokenizer may shorten a text beforehand."""
    if tokenizer.backend_tokenizer.normalizer is not None:
        return 0
    return max(len(token.encode()) for token in tokenizer.get_vocab())


def uses_boxes(template) -> bool:
    """Whether a chat template is LMDeploy's own kind, with fields for each role."""
    from lmdeploy.model import BaseChatTemplate

    return type(template).messages2prompt is BaseChatTemplate.messages2prompt


def check_ids(engine, input_ids: list[int]) -> None:
    """Tokens are in the vocabulary, and not too many."""
    size = vocabulary(engine)
    for token in input_ids:
        if not 0 <= token < size:
            raise ValueError(f"input_ids: {token} is no token; they go from 0 to {size - 1}")
    if not input_ids or len(input_ids) >= engine.session_len:
        raise ValueError(f"input_ids: {len(input_ids)} tokens; between 1 and "
                         f"{engine.session_len - 1} are possible")


def vocabulary(engine) -> int:
    """The number of logits."""
    config = getattr(engine.hf_cfg, "text_config", engine.hf_cfg)
    return config.vocab_size


def check_generation(engine, config) -> None:
    """The settings of a generation are numbers that the sampler can compute with.

    Raises:
        ValueError: one of them is not.
    """
    if config is None:
        return
    low, high = REPETITION_PENALTY
    if not low <= config.repetition_penalty <= high:  # also refuses NaN
        raise ValueError(f"repetition_penalty must be between {low} and {high}, "
                         f"not {config.repetition_penalty}")
    for name in ("temperature", "top_p", "min_p"):
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name} must be a number, not {getattr(config, name)}")
    if config.temperature < MIN_TEMPERATURE:
        config.temperature, config.top_k = 1.0, 1
    if config.top_k >= vocabulary(engine):
        config.top_k = 0  # no limit
    if config.logprobs is not None and not 0 <= config.logprobs <= MAX_LOGPROBS:
        raise ValueError(f"at most {MAX_LOGPROBS} log-probabilities are given for a token, "
                         f"not {config.logprobs}")
    for name in ("repetition_ngram_size", "repetition_ngram_threshold"):
        if getattr(config, name) > engine.session_len:
            raise ValueError(f"{name} must be at most {engine.session_len}")
    for token in config.stop_token_ids or ():
        if not 0 <= token < vocabulary(engine):
            raise ValueError(f"stop_token_ids: {token} is no token")
    fault = fault_in_stop(config.stop_words)
    if fault:
        raise ValueError(fault)
    least, most = config.min_new_tokens or 0, config.max_new_tokens
    if least < 0 or least > (engine.session_len if most is None else most):
        raise ValueError(f"min_new_tokens must be between 0 and max_tokens, not {least}")
    if len(json.dumps(config.response_format)) > MAX_SCHEMA:
        raise ValueError(f"response_format: more than {MAX_SCHEMA} characters")
    if config.response_format and (config.ignore_eos or least):
        raise ValueError("response_format decides where the answer ends: it cannot be combined "
                         "with ignore_eos or min_new_tokens")
    if config.with_cache or config.preserve_cache or config.migration_request:
        if engine.backend_config.role.name == "Hybrid":
            raise ValueError("migration_request, with_cache and preserve_cache are for servers "
                             "that share their caches")


def fit(engine, request) -> None:
    """The answer ends where the model's context does."""
    config = request.gen_config
    config.max_new_tokens = min(config.max_new_tokens,
                                engine.session_len - request.input_token_len)
