"""LMDeploy's command line, as lmdeploy_cli.py starts it. One function for each symbol."""
from argparse import Namespace

from . import default_device
from .quantization import HUB_DATASET
from .upstream import Patch, exchange, look_at

ARGUMENTS = "lmdeploy.cli.utils.ArgumentHelper"
SERVE = "lmdeploy.cli.serve.SubCliServe"


def patches() -> list[Patch]:
    """All of this file, checked and not applied."""
    found = [data_option(), length_option(), address("api_server"), address("proxy"),
             page_command()]
    return found + [device_option(), dtype_option()] if default_device() == "cpu" else found


def address(command: str) -> Patch:
    """`serve` listens to the whole network unless told otherwise, without any password."""
    symbol = f"{SERVE}.add_parser_{command}"
    original = look_at(
        symbol, parameters=[], contains=["'--server-name', type=str, default='0.0.0.0'"]
    ).__func__

    def add_parser() -> None:
        from lmdeploy.cli.serve import SubCliServe

        original()
        parser = SubCliServe.subparsers.choices[command]
        parser.set_defaults(server_name="127.0.0.1")
        for action in parser._actions:
            if action.dest == "server_name":
                action.help = "address to listen to; 0.0.0.0 lets other computers in"

    return exchange(symbol, "listens to every computer that reaches this one",
                    staticmethod(add_parser))


def page_command() -> Patch:
    """`serve gradio`: the chat page, which LMDeploy dropped in 0.10; model/web/ is ours."""
    symbol = f"{SERVE}.add_parsers"
    original = look_at(symbol, parameters=[], contains=["SubCliServe.add_parser_api_server()",
                                                        "SubCliServe.add_parser_proxy()"]).__func__

    def add_parsers() -> None:
        from lmdeploy.cli.serve import SubCliServe

        original()
        description = "Serve a web page on which one can chat with an api_server."
        parser = SubCliServe.subparsers.add_parser("gradio", description=description,
                                                   help=description)
        parser.set_defaults(run=run_page)
        add = parser.add_argument
        add("api_server_url", help="such as http://localhost:23333, with or without /v1")
        add("--server-name", default="127.0.0.1",
            help="address to listen to; 0.0.0.0 lets other computers in, and there is no password")
        add("--server-port", type=int, default=6006, help="port of the page")
        add("--api-key", help="one of the server's --api-keys, if it wants one")
        # `run` of LMDeploy's entry point puts a model's path into any option named model_name.
        add("--model-name", dest="served_name", help="instead of the first that the server names")
        add("--language", choices=["zh", "en"], help="instead of the browser's own")

    return exchange(symbol, "no longer offers the web page `gradio`", staticmethod(add_parsers))


def run_page(args: Namespace) -> None:
    """What `serve gradio` does with its options."""
    from codeact_pipeline import tools
    from model.web.server import serve

    serve(args.api_server_url, server_name=args.server_name, server_port=args.server_port,
          api_key=args.api_key, model_name=args.served_name, language=args.language, tools=tools)


def data_option() -> Patch:
    """`--calib-dataset`: its choices are data sets on a hub."""
    symbol = f"{ARGUMENTS}.calib_dataset"
    look_at(symbol, parameters=["parser"], contains=[f"default='{HUB_DATASET}'", "choices="])

    def calib_dataset(parser):
        return parser.add_argument(
            "--calib-dataset",
            default="sft",
            help="text to calibrate on: a .jsonl or .txt file, a folder of them, or sft for the "
            "data that train_sft.py uses",
        )

    return exchange(symbol, "accepts only names of data sets on a hub",
                    staticmethod(calib_dataset))


def length_option() -> Patch:
    """`--calib-seqlen`: rows of 2048 tokens, four times as long as those of training."""
    symbol = f"{ARGUMENTS}.calib_seqlen"
    look_at(symbol, parameters=["parser"], contains=["default=2048"])

    def calib_seqlen(parser):
        return parser.add_argument(
            "--calib-seqlen", type=int, default=512, help="tokens in a row of calibration text"
        )

    return exchange(symbol, "takes rows longer than the model was trained on",
                    staticmethod(calib_seqlen))


def device_option() -> Patch:
    """`--device`: its choices are accelerators."""
    symbol = f"{ARGUMENTS}.device"
    original = look_at(symbol, parameters=["parser", "default", "choices"]).__func__

    def device(parser, default: str = "cpu", choices: tuple[str, ...] = ()):
        return original(parser, default="cpu", choices=["cpu", "cuda", "ascend", "maca", "camb"])

    return exchange(symbol, "does not offer cpu", staticmethod(device))


def dtype_option() -> Patch:
    """`--dtype`: its choices have 16 bits."""
    symbol = f"{ARGUMENTS}.dtype"
    look_at(symbol, parameters=["parser", "default"], contains=["['auto', 'float16', 'bfloat16']"])

    def dtype(parser, default: str = "auto"):
        return parser.add_argument(
            "--dtype",
            default=default,
            choices=["auto", "float32", "bfloat16", "float16"],
            help="of weights and activations; auto is bfloat16 where the processor computes in it",
        )

    return exchange(symbol, "does not offer float32", staticmethod(dtype))
