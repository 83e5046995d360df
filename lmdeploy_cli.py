"""Stage Ⅷ: LMDeploy's own commands, with this repository's model and the cpu device in them.

In:   Yuanmeng_Models/yuanmeng-26m-instruct, which convert_to_transformers.py makes.
Out:  a quantized model, a conversation in the terminal, a server on 127.0.0.1:23333 that speaks
      OpenAI's protocol, or a page on 127.0.0.1:6006 to chat with it.
Next: codeact_pipeline.py

    python lmdeploy_cli.py lite auto_awq Yuanmeng_Models/yuanmeng-26m-instruct \\
        --work-dir Yuanmeng_Models/yuanmeng-26m-instruct-w4a16-4bit
    python lmdeploy_cli.py chat Yuanmeng_Models/yuanmeng-26m-instruct-w4a16-4bit
    python lmdeploy_cli.py serve api_server Yuanmeng_Models/yuanmeng-26m-instruct-w4a16-4bit \\
        --quant-policy 4 --chat-template chat_templates.json
    python lmdeploy_cli.py serve gradio http://localhost:23333
"""
import sys

import patches


def main() -> None:
    try:
        patches.register()
    except patches.UpstreamChanged as error:
        sys.exit(f"lmdeploy_cli.py: {error}")
    from lmdeploy.cli.entrypoint import run

    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
