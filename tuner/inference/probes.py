"""The six probes, and where held-out rows stand."""

from tuner.data import tool_call

HELD_OUT = "heldout.json"
# Four that need the call and two that do not; none of them stands in examples.json or heldout.json.
PROBES = [
    ("Какой у меня остаток на счёте?", True),
    ("Покажи мои последние покупки", True),
    ("Мой договор ещё действует?", True),
    ("Сколько я задолжал за квартиру?", True),
    ("Что такое кредитный лимит?", False),
    ("Добрый день, как настроение?", False),
]
CALL = tool_call.Call("get_sensitive_data", {}, ())
