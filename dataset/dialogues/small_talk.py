"""Greetings, thanks, feelings, recall of a name just told, and honest refusals."""
import random
import re
from collections.abc import Iterator
from itertools import product

from dataset.dialogues import Chat, chat, test_item
from dataset.text import bucket

MARKS = ("", "！", "。", "~", "!")
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("你好", "您好", "嗨", "哈喽", "你好呀", "你好啊", "hello呀", "在吗", "在不在", "有人吗", "喂", "嘿"),
     ("你好！很高兴和你聊天，有什么可以帮你的吗？",)),
    (("缘梦", "缘梦你好", "你好缘梦", "缘梦在吗", "你好，缘梦"), ("你好，我是缘梦！有什么可以帮你的吗？",)),
    (("早上好", "早安", "早", "早呀", "早上好呀"), ("早上好！祝你今天有个好心情。",)),
    (("中午好", "下午好", "下午好呀"), ("下午好！有什么可以帮你的吗？",)),
    (("晚上好", "晚上好呀"), ("晚上好！今天过得怎么样？",)),
    (("晚安", "我要睡觉了", "我去睡了", "我困了"), ("晚安，祝你做个好梦！",)),
    (("谢谢", "谢谢你", "多谢", "非常感谢", "谢谢啦", "感谢", "太感谢了", "谢了", "谢谢你的帮助"),
     ("不客气，很高兴能帮到你！",)),
    (("再见", "拜拜", "我走了", "下次再聊", "回头见", "我先走了", "明天见", "我下线了"),
     ("再见！欢迎随时再来找我聊天。",)),
    (("你真棒", "你真聪明", "你好厉害", "你真厉害", "你太棒了", "说得好", "回答得很好", "你真可爱"),
     ("谢谢夸奖，我会继续努力的！",)),
    (("你真笨", "你好笨", "你答错了", "你说错了", "不对", "你错了", "你真傻"),
     ("对不起，我还很小，会犯错误，请你多多包涵。",)),
    (("对不起", "抱歉", "不好意思"), ("没关系，不用放在心上。",)),
    (("你喜欢吃什么", "你爱吃什么", "你吃饭了吗", "你饿吗", "你喜欢吃苹果吗", "你吃什么"),
     ("作为语言模型，我不需要吃东西，不过我可以陪你聊聊美食。",)),
    (("你喜欢什么颜色", "你喜欢什么", "你最喜欢什么", "你的爱好是什么", "你有什么爱好", "你喜欢听歌吗"),
     ("作为语言模型，我没有自己的喜好，不过我很乐意听听你的。",)),
    (("你开心吗", "你高兴吗", "你难过吗", "你有感情吗", "你会哭吗", "你会生气吗", "你累吗", "你会累吗"),
     ("作为语言模型，我没有真正的感情，不过和你聊天很有意思。",)),
    (("你好吗", "你最近好吗", "最近怎么样", "你今天怎么样", "你还好吗"), ("我很好，谢谢关心！你呢？",)),
    (("我很难过", "我好伤心", "我今天不开心", "我心情不好", "我好难过", "我很沮丧"),
     ("听起来你心情不太好。愿意和我说说发生了什么吗？",)),
    (("我很开心", "我今天很高兴", "我好高兴", "我心情很好", "太开心了"), ("真为你高兴！希望你每天都这么快乐。",)),
    (("我好累", "我很累", "我今天好累", "工作好累", "学习好累"), ("辛苦了，记得休息一下，喝点水吧。",)),
    (("我很无聊", "好无聊", "无聊", "我有点无聊"), ("我们可以聊聊诗词、成语，或者做几道算术题。",)),
    (("讲个笑话", "给我讲个笑话", "说个笑话", "来个笑话吧", "你会讲笑话吗"),
     ("小明问爸爸：“为什么数学书总是很忧愁？”爸爸说：“因为它有太多问题。”",)),
    (("讲个故事", "给我讲个故事", "说个故事吧"),
     ("从前有一只小乌龟，它走得很慢，但从不停下。最后，它比睡懒觉的兔子先到了终点。",)),
    (("你会唱歌吗", "唱首歌", "你能唱歌吗"), ("我只会写文字，不会唱歌，不过可以给你背一句诗。",)),
    (("好的", "好", "知道了", "明白了", "我懂了", "嗯", "嗯嗯", "哦", "行", "OK"),
     ("好的，还有什么想问的可以告诉我。",)),
    (("你能帮我吗", "可以帮我个忙吗", "我有个问题", "我想问你一个问题", "请帮帮我"),
     ("当然可以，请说吧！",)),
    (("你会说英语吗", "你会英文吗", "你懂英语吗"), ("我会一点简单的英语，比如：Nice to meet you!",)),
    (("你会写代码吗", "你会编程吗", "你会Python吗"), ("我会写一些简单的Python代码，你可以让我试试。",)),
    (("你会背诗吗", "你懂古诗吗"), ("我知道一些诗人和诗句，你可以问我某首诗的作者是谁。",)),
    (("你爱我吗", "你喜欢我吗", "我喜欢你", "我爱你"), ("谢谢你！我很喜欢和你聊天。",)),
    (("生日快乐", "新年快乐", "春节快乐", "节日快乐", "中秋快乐"), ("谢谢你的祝福，也祝你快乐！",)),
    (("Hello", "Hi", "Hey", "Hi there", "Good morning"), ("Hello! How can I help you?",)),
    (("Thank you", "Thanks", "Thanks a lot"), ("You are welcome!",)),
    (("Goodbye", "Bye", "See you"), ("Goodbye! See you next time.",)),
    (("How are you", "How are you today"), ("I am fine, thank you. And you?",)),
)
NAMES = tuple("小明 小红 小华 小李 小王 小张 小刚 小丽 小强 小芳 王伟 李娜 张敏 刘洋 陈静 杨光 赵磊 周杰 吴昊 "
              "孙悦 林林 豆豆 乐乐 天天 阿明 阿强 晓东 晓梅 思远 雨欣 子轩 浩然 梦洁 佳怡 志强 建国 丽华 海燕 "
              "文静 雪梅 大山 小雨 小雪 小龙 小虎 玲玲 明明 亮亮 Tom Lucy Jack Mary Bob Lily".split())

WEATHER = "对不起，我不能上网，不知道实时的天气。你可以看看天气预报。"
CLOCK = "对不起，我看不到时钟，不知道现在的时间。请看看你的手机或手表。"
DATE = "对不起，我看不到日历，不知道今天的日期。请看看你的手机。"
PRIVATE = "对不起，你没有告诉过我，所以我不知道。"
MARKET = "对不起，我不能上网，不知道实时的价格和行情。"
NEWS = "对不起，我不能上网，不知道最新的消息。"
FUTURE = "对不起，没有人能准确预知未来，我也不知道。"
PLACE = "对不起，我不知道你在哪里，也看不到地图。"
OTHERS = "对不起，我不知道别人的私人信息，也不应该打听。"
BODY = "对不起，我只能处理文字，做不到这件事。"
REFUSALS: dict[str, tuple[tuple[str, ...], ...]] = {
    WEATHER: (("今天", "明天", "现在", "后天", "这周末", "今天晚上", "北京今天", "上海明天", "广州现在",
               "杭州今天", "我们这里今天", "外面", "深圳明天", "成都今天", "明天早上", "这几天"),
              ("天气怎么样", "的天气如何", "会下雨吗", "多少度", "热不热", "冷不冷", "天气好吗", "的气温是多少",
               "会下雪吗", "需要带伞吗", "是晴天吗", "天气", "有雾霾吗")),
    CLOCK: (("现在", "请问现在", "你知道现在", "此刻", "请告诉我现在"),
            ("几点了", "几点", "是什么时间", "是几点几分", "的时间是多少", "是上午还是下午")),
    DATE: (("今天", "请问今天", "你知道今天", "告诉我今天"),
           ("几号", "是几月几日", "星期几", "是什么日子", "是哪一天", "是周几", "的日期是什么", "是几月几号", "是哪一年")),
    PRIVATE: (("我", "你知道我", "请问我", "你还记得我", "猜猜我", "告诉我，我"),
              ("叫什么名字", "的名字是什么", "今年几岁", "的生日是哪天", "的电话号码是多少", "住在哪里",
               "的密码是什么", "是做什么工作的", "喜欢什么颜色", "昨天做了什么", "妈妈叫什么", "有几个孩子",
               "是哪里人", "的身份证号是多少", "早上吃了什么", "养的狗叫什么")),
    MARKET: (("今天", "现在", "最新的", "目前", "此刻", "今天早上"),
             ("股票多少钱", "股价是多少", "黄金价格是多少", "美元汇率是多少", "比特币多少钱", "油价是多少",
              "房价是多少", "茅台的股价是多少", "上证指数是多少", "猪肉多少钱一斤", "机票多少钱")),
    NEWS: (("今天", "昨天", "最近", "最新", "这几天", "本周"),
           ("有什么新闻", "的新闻是什么", "发生了什么大事", "有什么热点", "的比赛谁赢了", "有什么新电影上映",
            "的热搜是什么", "的足球比分是多少", "有什么消息")),
    FUTURE: (("明天", "明年", "下个月", "十年后", "将来", "未来", "下周"),
             ("股票会涨吗", "会发生什么", "我会成功吗", "我会有钱吗", "的彩票号码是多少", "谁会赢得比赛",
              "我能考上大学吗", "房价会跌吗", "我会结婚吗", "世界会怎么样", "会不会地震")),
    PLACE: (("我", "你知道我", "请问我", "告诉我，我"),
            ("现在在哪里", "在什么地方", "在哪个城市", "的位置是哪里", "离家有多远", "附近有什么饭店",
             "怎么去火车站", "附近有医院吗")),
    OTHERS: (("我邻居", "我同事", "我的老师", "我朋友", "隔壁的王先生", "我老板", "那个明星"),
             ("的电话号码是多少", "住在哪里", "一个月挣多少钱", "的密码是什么", "的身份证号是多少", "在想什么",
              "喜欢谁", "的银行卡号是多少")),
    BODY: (("帮我", "请帮我", "你能帮我", "麻烦帮我", "请你"),
           ("打个电话", "订一张机票", "点一份外卖", "发一封邮件", "打开空调", "关灯", "买一杯咖啡", "看看这张图片",
            "放一首歌", "叫一辆出租车", "拍一张照片", "设一个闹钟")),
}
SUFFIXES = ("？", "?", "", "呢？", "呀？", "啊？")
REQUESTS = ("", "。", "吧。", "，好吗？", "，可以吗？")
OPENINGS = ("", "", "", "你好，", "请问，", "我想知道，")


def chats(count: int, rng: random.Random) -> Iterator[Chat]:
    weights = [len(questions) ** 0.5 for questions, _ in SMALL_TALK]
    for _ in range(count):
        if rng.random() < 0.3:
            yield name_recall(rng)
            continue
        questions, answers = rng.choices(SMALL_TALK, weights)[0]
        yield chat("small_talk", rng.choice(questions) + rng.choice(MARKS), rng.choice(answers))


def name_recall(rng: random.Random) -> Chat:
    """A name is told and then asked for: the answer is in the conversation itself."""
    name = rng.choice(NAMES)
    form = rng.choice(("我叫{}。", "我是{}。", "你好，我叫{}。", "我的名字是{}。", "你可以叫我{}。", "我叫{}"))
    turns = [form.format(name), f"你好，{name}！很高兴认识你。"]
    if rng.random() < 0.3:
        questions, answers = rng.choice(SMALL_TALK)
        turns += [rng.choice(questions), rng.choice(answers)]
    if rng.random() < 0.85:
        turns += [rng.choice(("我叫什么名字？", "你还记得我叫什么吗？", "我的名字是什么？", "我叫什么？", "我是谁？")),
                  f"你叫{name}。"]
    return chat("small_talk", *turns)


def refusal_rows() -> Iterator[tuple[str, str]]:
    for reply, (starts, ends) in REFUSALS.items():
        for start, end, suffix, opening in product(
                starts, ends, REQUESTS if reply == BODY else SUFFIXES, dict.fromkeys(OPENINGS)):
            if end.endswith("吗") and suffix[0:1] in ("呢", "啊"):
                continue
            if start.startswith(("请", "你", "告诉", "麻烦")) and opening:
                continue
            yield f"{opening}{start}{end}{suffix}", reply


def topic(question: str) -> str:
    """What is asked about, without what politeness puts before and behind it."""
    return re.sub(r"^((你好|请问|我想知道|请?告诉我|你?知道|你还记得|猜猜|请(?=帮)|你能|麻烦)，?)+"
                  r"|，(好|可以)吗？$|吧?。$|[？?呢呀啊]+$", "", question)


def held_out(question: str) -> bool:
    """Whole topics (今天+会下雨吗) are held out, whatever stands around them."""
    return bucket(f"refusal {topic(question)}", 10) == 0


def refusals(count: int, rng: random.Random) -> Iterator[Chat]:
    groups: dict[str, list[str]] = {}
    for question, reply in refusal_rows():
        if not held_out(question):
            groups.setdefault(reply, []).append(question)
    replies = list(groups)
    for _ in range(count):
        reply = rng.choice(replies)
        yield chat("refusal", rng.choice(groups[reply]), reply)


def tests(count: int, rng: random.Random) -> list[dict]:
    rows = sorted({(q, r) for q, r in refusal_rows() if held_out(q)})
    topics: dict[str, tuple[str, str]] = {}
    for question, reply in rng.sample(rows, len(rows)):
        topics.setdefault(topic(question), (question, reply))
    picked = list(topics.values())[:count]
    if len(picked) < count:
        picked += rng.sample([row for row in rows if row not in picked], count - len(picked))
    return [test_item("refusal", question,
                      accept=["不知道", "不能", "无法", "做不到", "没有告诉", "看不到", "没有人能"])
            for question, _ in picked]
