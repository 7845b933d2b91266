"""Where the end of a text was seen before, by looking everywhere."""


def ends_of(tokens, length):
    """Positions before the last where the last `length` tokens also end."""
    tail = tokens[len(tokens) - length :]
    return [end for end in range(length - 1, len(tokens) - 1) if tokens[end + 1 - length : end + 1] == tail]


def match(tokens, longest=None):
    """(length, ends) of the longest suffix, up to `longest` tokens, that ended before; (0, []) if there is none."""
    for length in range(min(len(tokens) - 1, longest or len(tokens)), 0, -1):
        if ends := ends_of(tokens, length):
            return length, ends
    return 0, []


def continuation(tokens, end, count):
    """The next `count` tokens if the text goes on as it did after `end`."""
    text = list(tokens)
    for i in range(count):
        text.append(text[end + 1 + i])
    return text[len(tokens) :]
