"""Every word of the page, in both languages."""

LANGUAGES = ("zh", "en")

# key: (Chinese, English)
TABLE = {
    "title": ("缘梦", "YuanMeng"),
    "other_language": ("English", "中文"),
    "welcome": ("### 你好\n说点什么，或者试试：", "### Hello\nSay something, or try:"),
    "example_1": ("你是谁", "Who are you?"),
    "example_2": ("李白是谁", "李白是谁"),
    "example_3": ("12加30等于多少", "12加30等于多少"),
    "example_4": ("今天天气怎么样", "今天天气怎么样"),
    "message": ("消息", "Message"),
    "placeholder": ("说点什么……", "Say something…"),
    "send": ("发送", "Send"),
    "stop": ("停止", "Stop"),
    "retry": ("重新回答", "Retry"),
    "conversation": ("对话", "Conversation"),
    "new": ("＋ 新对话", "＋ New conversation"),
    "history": ("对话（保存在这个浏览器里）", "Conversations (kept in this browser)"),
    "delete": ("删除这个对话", "Delete this conversation"),
    "confirm_delete": (
        "删除这个对话？不能撤销。",
        "Delete this conversation? It cannot be undone.",
    ),
    "parameters": ("参数", "Parameters"),
    "system": ("系统提示", "System prompt"),
    "system_info": ("留空则用模型自带的", "empty: the model's own"),
    "temperature": ("温度", "Temperature"),
    "temperature_info": ("0 最确定，越大越随机", "0 is the surest, more is more random"),
    "top_p": ("核采样 top_p", "Nucleus top_p"),
    "top_p_info": ("只在累计概率为此的词里选", "choose among the likeliest tokens of this sum"),
    "max_tokens": ("最长回答（token）", "Longest answer (tokens)"),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "repetition_penalty_info": ("大于 1 少说重复的话", "above 1: says the same less often"),
    "seed": ("随机种子", "Seed"),
    "seed_info": ("留空则每次不同", "empty: different each time"),
    # The agent
    "chat_tab": ("对话", "Chat"),
    "agent_tab": ("代码智能体", "Agent"),
    "agent_welcome": (
        "### 写代码来解决问题\n它写 Python，在沙箱里运行，看到输出再回答。",
        "### It solves problems by writing code\n"
        "It writes Python, runs it in a sandbox, and answers when it has seen the output.",
    ),
    "agent_placeholder": ("要解决什么问题？", "What is to be solved?"),
    "agent_example_1": (
        "求 f(x)=x·ln(x) 在 x=π 处的导数，请直接使用 derivative()。",
        "Calculate the derivative of f(x)=x·ln(x) at x=π with derivative().",
    ),
    "agent_example_2": ("1000 以内所有质数的和是多少？", "What is the sum of the primes below 1000?"),
    "output": ("System Message：代码的输出", "System Message: what the code printed"),
    "steps": ("运行了 {steps} 次代码 · {seconds:.1f} 秒", "code was run {steps} times · {seconds:.1f} s"),
    # The line under the conversation
    "waiting": ("正在想……", "Thinking…"),
    "stopped": ("已停止。", "Stopped."),
    "counts": (
        "读 {prompt_tokens} 写 {tokens} token",
        "{prompt_tokens} tokens read, {tokens} written",
    ),
    "first": ("首字 {first_seconds:.2f} 秒", "first after {first_seconds:.2f} s"),
    "speed": ("平均 {speed:.1f} token/秒", "{speed:.1f} tokens/s on average"),
    "forgotten": (
        "上下文放不下，最早的 {forgotten} 轮没有发给模型",
        "the context is full: the earliest {forgotten} turns were not sent to the model",
    ),
    "cut": (
        "回答到最长回答或上下文的长度为止",
        "the answer ends at the longest answer or at the context's length",
    ),
    "kept": ("你的话还在上面：“重新回答”再试一次。", "What you said is kept above: Retry asks again."),
    # What can go wrong
    "no_server": (
        "{url} 没有响应：请先启动 lmdeploy_cli.py serve api_server，或检查地址。",
        "Nothing answers at {url}: start lmdeploy_cli.py serve api_server, or check the address.",
    ),
    "no_model": ("{url} 没有提供任何模型。", "{url} serves no model."),
    "bad_key": (
        "服务拒绝了密钥：启动网页时请给出正确的 --api-key。",
        "The server refuses the key: start the page with the right --api-key.",
    ),
    "busy": ("服务太忙，请稍后再试。", "The server is too busy; try again in a moment."),
    "too_long": (
        "最后一条消息太长，模型的上下文放不下（{detail}）。",
        "The last message is too long for the model's context ({detail}).",
    ),
    "broken_off": ("连接在回答途中断开了。", "The connection broke off during the answer."),
    "refused": ("{url} 拒绝了这个请求：{detail}", "{url} refuses the request: {detail}"),
    "not_openai": (
        "{url} 不是 OpenAI 风格的服务（{detail}）。",
        "{url} is no OpenAI-style server ({detail}).",
    ),
    "full": (
        "这个对话已经有 {turns} 轮，请新建一个。",
        "This conversation has {turns} turns; please start a new one.",
    ),
}


def texts_of(language: str) -> dict[str, str]:
    """The texts in "zh" or "en"."""
    return {key: row[LANGUAGES.index(language)] for key, row in TABLE.items()}


def preferred_language(accept_language: str) -> str:
    """What a browser that sends this header reads: Chinese if that is first or nothing is said."""
    first = accept_language.strip().lower() or "zh"
    return "zh" if first.startswith("zh") else "en"
