"""Small Python tasks with short, right code: every answer here has been run by the tests."""
import random
from collections.abc import Iterator

from dataset.dialogues import Chat, chat

ASK = ("用Python{}。", "写一段Python代码，{}。", "请用Python{}。", "写一个Python程序{}。", "帮我用Python{}。",
       "Python怎么{}？", "写代码{}。", "怎样用Python{}？")
ASK_FUNCTION = ("写一个函数，{}。", "用Python写一个函数{}。", "请写一个Python函数，{}。", "帮我写个函数{}。",
                "定义一个函数，{}。")
WORDS = ("你好", "hello", "缘梦", "python", "world", "apple", "春天", "banana", "Hello World", "学习")
# (task, code); names in braces are drawn by `values`.
TASKS = (
    ("打印“{word}”", 'print("{word}")'),
    ("输出{word}", 'print("{word}")'),
    ("打印1到{n}", "for i in range(1, {n} + 1):\n    print(i)"),
    ("打印从{n}到1", "for i in range({n}, 0, -1):\n    print(i)"),
    ("把“{word}”打印{k}遍", 'for _ in range({k}):\n    print("{word}")'),
    ("计算{a}加{b}", "print({a} + {b})"),
    ("计算{a}减{b}", "print({a} - {b})"),
    ("计算{a}乘以{b}", "print({a} * {b})"),
    ("算一下{a}*{b}", "print({a} * {b})"),
    ("算一下{a}+{b}", "print({a} + {b})"),
    ("计算{a}除以{k}的余数", "print({a} % {k})"),
    ("计算{k}的平方", "print({k} ** 2)"),
    ("计算{a}的平方", "print({a} ** 2)"),
    ("计算{k}的{j}次方", "print({k} ** {j})"),
    ("计算1到{n}的和", "print(sum(range(1, {n} + 1)))"),
    ("求1到{n}的所有偶数", "print([i for i in range(1, {n} + 1) if i % 2 == 0])"),
    ("求1到{n}的所有奇数", "print([i for i in range(1, {n} + 1) if i % 2 == 1])"),
    ("计算{k}的阶乘", "result = 1\nfor i in range(1, {k} + 1):\n    result *= i\nprint(result)"),
    ("求列表{list}的和", "numbers = {list}\nprint(sum(numbers))"),
    ("求列表{list}的最大值", "numbers = {list}\nprint(max(numbers))"),
    ("求列表{list}的最小值", "numbers = {list}\nprint(min(numbers))"),
    ("求列表{list}的平均值", "numbers = {list}\nprint(sum(numbers) / len(numbers))"),
    ("求列表{list}的长度", "numbers = {list}\nprint(len(numbers))"),
    ("把列表{list}从小到大排序", "numbers = {list}\nprint(sorted(numbers))"),
    ("把列表{list}从大到小排序", "numbers = {list}\nprint(sorted(numbers, reverse=True))"),
    ("反转列表{list}", "numbers = {list}\nprint(numbers[::-1])"),
    ("去掉列表{list}里的重复数字", "numbers = {list}\nprint(sorted(set(numbers)))"),
    ("遍历列表{list}", "numbers = {list}\nfor number in numbers:\n    print(number)"),
    ("把{k}加到列表{list}的末尾", "numbers = {list}\nnumbers.append({k})\nprint(numbers)"),
    ("取出列表{list}的第一个元素", "numbers = {list}\nprint(numbers[0])"),
    ("取出列表{list}的最后一个元素", "numbers = {list}\nprint(numbers[-1])"),
    ("把字符串“{word}”反转", 'text = "{word}"\nprint(text[::-1])'),
    ("求字符串“{word}”的长度", 'text = "{word}"\nprint(len(text))'),
    ("把字符串“{word}”变成大写", 'text = "{word}"\nprint(text.upper())'),
    ("判断{a}是不是偶数", 'number = {a}\nif number % 2 == 0:\n    print("是偶数")\nelse:\n    print("不是偶数")'),
    ("比较{a}和{b}的大小", "a = {a}\nb = {b}\nprint(max(a, b))"),
    ("交换两个变量的值", "a = {a}\nb = {b}\na, b = b, a\nprint(a, b)"),
    ("创建一个字典并取值", 'ages = {{"小明": {k}, "小红": {j}}}\nprint(ages["小明"])'),
    ("遍历一个字典", 'ages = {{"小明": {k}, "小红": {j}}}\nfor name, age in ages.items():\n    print(name, age)'),
    ("打印九九乘法表", 'for i in range(1, 10):\n    for j in range(1, i + 1):\n        print(f"{{j}}×{{i}}={{i * j}}", end=" ")\n    print()'),
    ("打印斐波那契数列的前{n}项", "a, b = 0, 1\nfor _ in range({n}):\n    print(a)\n    a, b = b, a + b"),
    ("打印{k}行星号", 'for i in range(1, {k} + 1):\n    print("*" * i)'),
    ("计算圆的面积，半径是{k}", "import math\nprint(math.pi * {k} ** 2)"),
    ("计算{a}的平方根", "import math\nprint(math.sqrt({a}))"),
)
FUNCTIONS = (
    ("计算两个数的和", "def add(a, b):\n    return a + b", "add(2, 3) == 5"),
    ("计算两个数的差", "def subtract(a, b):\n    return a - b", "subtract(5, 3) == 2"),
    ("计算两个数的乘积", "def multiply(a, b):\n    return a * b", "multiply(4, 3) == 12"),
    ("返回两个数中较大的一个", "def larger(a, b):\n    return a if a > b else b", "larger(2, 9) == 9"),
    ("返回两个数中较小的一个", "def smaller(a, b):\n    return a if a < b else b", "smaller(2, 9) == 2"),
    ("计算一个数的平方", "def square(n):\n    return n * n", "square(7) == 49"),
    ("计算一个数的立方", "def cube(n):\n    return n ** 3", "cube(3) == 27"),
    ("判断一个数是不是偶数", "def is_even(n):\n    return n % 2 == 0", "is_even(4) and not is_even(7)"),
    ("判断一个数是不是奇数", "def is_odd(n):\n    return n % 2 == 1", "is_odd(7) and not is_odd(4)"),
    ("计算n的阶乘", "def factorial(n):\n    result = 1\n    for i in range(1, n + 1):\n        result *= i\n    return result", "factorial(5) == 120"),
    ("用递归计算n的阶乘", "def factorial(n):\n    if n <= 1:\n        return 1\n    return n * factorial(n - 1)", "factorial(6) == 720"),
    ("计算斐波那契数列的第n项", "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a", "fibonacci(10) == 55"),
    ("判断一个数是不是质数", "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, int(n ** 0.5) + 1):\n        if n % i == 0:\n            return False\n    return True", "[n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]"),
    ("计算1到n的和", "def sum_to(n):\n    return sum(range(1, n + 1))", "sum_to(100) == 5050"),
    ("求列表的平均值", "def average(numbers):\n    return sum(numbers) / len(numbers)", "average([1, 2, 3]) == 2"),
    ("求列表的最大值", "def largest(numbers):\n    return max(numbers)", "largest([3, 9, 4]) == 9"),
    ("求列表的最小值", "def smallest(numbers):\n    return min(numbers)", "smallest([3, 9, 4]) == 3"),
    ("反转字符串", "def reverse(text):\n    return text[::-1]", "reverse('abc') == 'cba'"),
    ("判断字符串是不是回文", "def is_palindrome(text):\n    return text == text[::-1]", "is_palindrome('level') and not is_palindrome('ab')"),
    ("统计字符在字符串里出现的次数", "def count(text, char):\n    return text.count(char)", "count('banana', 'a') == 3"),
    ("去掉列表里重复的元素", "def unique(items):\n    return list(dict.fromkeys(items))", "unique([1, 2, 1]) == [1, 2]"),
    ("把摄氏度转换成华氏度", "def to_fahrenheit(celsius):\n    return celsius * 9 / 5 + 32", "to_fahrenheit(100) == 212"),
    ("计算长方形的面积", "def area(width, height):\n    return width * height", "area(3, 4) == 12"),
    ("计算圆的面积", "import math\n\ndef circle_area(radius):\n    return math.pi * radius ** 2", "round(circle_area(1), 2) == 3.14"),
    ("求两个数的最大公约数", "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a", "gcd(12, 18) == 6"),
    ("判断一年是不是闰年", "def is_leap(year):\n    return year % 4 == 0 and year % 100 != 0 or year % 400 == 0", "is_leap(2000) and is_leap(2024) and not is_leap(1900)"),
    ("返回列表里的偶数", "def evens(numbers):\n    return [n for n in numbers if n % 2 == 0]", "evens([1, 2, 3, 4]) == [2, 4]"),
    ("统计一段文字有多少个单词", "def count_words(text):\n    return len(text.split())", "count_words('a b c') == 3"),
    ("向某人问好", 'def greet(name):\n    print(f"你好，{name}！")', "greet('缘梦') is None"),
    ("求一个数的绝对值", "def absolute(n):\n    return n if n >= 0 else -n", "absolute(-3) == 3"),
)


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def task(rng: random.Random) -> tuple[str, str]:
    """(what to do, code) with numbers and words drawn anew."""
    values = {"word": rng.choice(WORDS), "n": rng.randint(3, 100), "k": rng.randint(2, 12),
              "j": rng.randint(2, 9), "a": rng.randint(1, 999), "b": rng.randint(1, 999),
              "list": [rng.randint(0, 99) for _ in range(rng.randint(3, 6))]}
    question, code = rng.choice(TASKS)
    return question.format(**values), code.format(**values)


def chats(count: int, rng: random.Random) -> Iterator[Chat]:
    for _ in range(count):
        if rng.random() < 0.35:
            question, code, _ = rng.choice(FUNCTIONS)
            turns = [rng.choice(ASK_FUNCTION).format(question), fenced(code)]
        else:
            question, code = task(rng)
            turns = [rng.choice(ASK).format(question), fenced(code)]
            if rng.random() < 0.15:
                question, code = task(rng)
                turns += [f"那{question}呢？", fenced(code)]
        yield chat("python", *turns)
