#!/usr/bin/env python3
"""Writes tests/data/jinja/snippets.json: small templates and what Jinja2 makes of them in transformers' sandbox, as text or
as null where it refuses.

    python scripts/golden/jinja_snippets.py [FILE]         (transformers 5.8.1, jinja2 3.1.6, Python 3.11)

The list is a product: every filter and every test over values of every kind, every operator over pairs of them, slices,
format strings, methods of texts; then the language by hand. What prints an address or the time is left out.
"""

import copy
import itertools
import json
import pathlib
import re
import sys

from transformers.utils.chat_template_utils import _compile_jinja_template

CONTEXT = {
    "messages": [{"role": "user", "content": "Hi, it's <b>"}, {"role": "assistant", "content": "Ho é"}],
    "tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "<s>", "eos_token": "</s>",
}

VALUES = [
    "none", "true", "false", "0", "7", "-3", "2.5", "-0.5", "1e20", "''", "'abc'", "' A b-c\\n'", "'12'", "'é<&>\"'", "[]",
    "[3, 1, 2]", "['b', 'A', 'c', 'a']", "[[1, 2], [3]]", "[{'a': 1, 'b': 'x'}, {'a': 0, 'b': 'Y'}, {'a': 1, 'b': 'y'}]", "()",
    "(1, 'x')", "{}", "{'b': 1, 'a': [2]}", "{1: 'x', none: 2.0, true: 'y'}", "range(4)", "missing", "messages",
]

FILTERS = [
    "abs", "attr('b')", "attr('upper')", "batch(2)|list", "batch(2, 'x')|list", "capitalize", "center(9)", "count", "d('x')",
    "default('x', true)", "default", "dictsort", "dictsort(by='value')", "dictsort(true, 'key', true)", "escape", "e",
    "filesizeformat", "filesizeformat(true)", "first", "float", "float(1.5)", "forceescape", "format(1)", "indent", "indent(2, true)",
    "indent(width=1, blank=true)", "indent('> ')", "int", "int(5)", "int(0, 16)", "items|list", "join", "join('-')", "join(d=', ')",
    "join(',', attribute='a')", "last", "length", "list", "lower", "map('upper')|list", "map(attribute='a')|list",
    "map(attribute='a', default='z')|list", "map('default', 'q')|list", "map('nosuch')|list", "max", "max(attribute='a')", "min",
    "min(case_sensitive=true)", "reject|list", "reject('none')|list", "rejectattr('a')|list", "replace('a', 'XY')",
    "replace('a', '', 1)", "reverse|list", "round", "round(1)", "round(0, 'ceil')", "round(1, 'floor')", "round(-1)", "safe",
    "select|list", "select('string')|list", "selectattr('a')|list", "selectattr('b', 'eq', 'x')|list", "selectattr('a', 'defined')|list",
    "slice(2)|list", "slice(3, 'f')|list", "sort", "sort(reverse=true)", "sort(case_sensitive=true)", "sort(attribute='a')",
    "sort(attribute='a,b')", "string", "striptags", "sum", "sum(attribute='a')", "sum(start=1.5)", "title", "tojson",
    "tojson(indent=2)", "tojson(ensure_ascii=true)", "tojson(sort_keys=true)", "tojson(separators=(',', ':'))", "trim", "trim('a')",
    "truncate(5)", "truncate(5, true, '!', 0)", "unique|list", "unique(true)|list", "unique(attribute='b')|list", "upper", "urlencode",
    "wordcount", "wordwrap(4)", "xmlattr", "xmlattr(false)", "groupby('a')|list", "groupby('b', case_sensitive=true)|list",
    "groupby('q', default='n')|list", "string|length", "nosuch",
]

TESTS = [
    "boolean", "callable", "defined", "divisibleby(3)", "eq(7)", "== 'abc'", "equalto none", "escaped", "even", "false", "filter",
    "float", "ge(1)", "gt 1", "greaterthan('a')", "in([7, 'abc', none])", "integer", "iterable", "le 2", "lower", "lt('b')",
    "lessthan 3", "mapping", "ne 7", "none", "number", "odd", "sameas(none)", "sameas true", "sequence", "string", "test", "true",
    "undefined", "upper", "not none", "not defined", "nosuch",
]

PAIRS = ["none", "true", "7", "-2", "0", "2.5", "'ab'", "'%s'", "''", "[1, 2]", "(1,)", "{'a': 1}", "range(2)", "missing"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]

METHODS = [
    "upper()", "lower()", "title()", "capitalize()", "swapcase()", "casefold()", "strip()", "lstrip()", "rstrip()", "strip('aA ')",
    "strip(none)", "split()", "rsplit()", "split(none, 1)", "rsplit(none, 1)", "split('b')", "rsplit('b', 1)", "split('b', maxsplit=1)",
    "split(sep='b')", "split('')", "splitlines()", "splitlines(true)", "partition('b')", "rpartition('b')", "partition('')",
    "removeprefix('a')", "removesuffix('c')", "replace('b', 'X')", "replace('', '-')", "replace('b', 'X', 1)", "startswith('a')",
    "startswith(('z', 'a'))", "startswith('b', 1)", "endswith('c')", "endswith(('c', 1))", "find('b')", "rfind('b')", "find('b', 2)",
    "find('c', -2)", "index('b')", "index('zz')", "rindex('b')", "count('b')", "count('')", "join(['x', 'y'])", "join('xyz')", "join([1])",
    "center(8)", "center(9, '*')", "ljust(8, '.')", "rjust(8)", "zfill(8)", "expandtabs()", "expandtabs(4)", "isalnum()", "isalpha()",
    "isascii()", "isdecimal()", "isdigit()", "isidentifier()", "islower()", "isnumeric()", "isprintable()", "isspace()", "istitle()",
    "isupper()", "encode()", "format(1)", "format()", "nosuch()", "nosuch", "__class__", "__len__()", "join()", "upper(1)",
    "center()", "zfill('x')", "translate({98: 'Q'})", "encode().decode()", "format_map({'a': 1})",
]
TEXTS = ["'abc'", "''", "' aB c\\tb\\n'", "'a,b,,c'", "'Über straße'", "'-12'", "'ab\\r\\nc\\x0bd\\u2028e'", "'A Title, It\\'s'", "'bbb'", "'{} {{}}'"]

OTHER_METHODS = [
    "{'b': 1, 'a': 2}.items()", "{'b': 1}.keys()", "{'b': 1}.values()", "{'b': 1}.items()|list", "{'b': 1}.get('b')",
    "{'b': 1}.get('c')", "{'b': 1}.get('c', 3)", "{'b': 1}.get()", "{'b': 1}.get(key='b')", "{'b': 1}.get([])", "{'b': 1}.copy()",
    "{'b': 1}.pop('b')", "{'b': 1}.update({})", "{'b': 1}.setdefault('c', 1)", "{'b': 1}.clear()", "{'b': 1}.popitem()",
    "{}.fromkeys(['a', 'b'])", "{}.fromkeys('ab', 0)", "{'items': 1}.items", "{'items': 1}['items']", "{'b': 1}.b", "{'b': 1}.c is defined",
    "{'b': 1}['keys']()", "{'a': 1}.items()|length", "'a' in {'a': 1}.keys()", "1 in {'a': 1}.values()", "('a', 1) in {'a': 1}.items()",
    "{'a': 1}.keys()[0]", "[1, 2].append(3)", "[1].extend([2])", "[2, 1].sort()", "[1].insert(0, 2)", "[1].pop()", "[1].remove(1)",
    "[1, 2].reverse()", "[1, 2, 1].count(1)", "[1, 2].index(2)", "[1, 2].index(3)", "[1].copy()", "[1].append is defined", "(1, 2).index(2)",
    "(1, 1).count(1)", "range(5).start", "range(5).stop", "range(1, 9, 2).step", "range(5).index(3)", "range(5).count(3)", "(5).real",
    "(255).bit_length()", "(5).numerator", "(2.0).is_integer()", "(2.5).is_integer()", "none.x", "none.x is defined", "none['x']",
    "none['x'] is defined", "none[0] is defined", "none()", "1()", "'a'()", "[]()", "missing()", "missing.x", "missing['x']",
    "messages.x", "messages.x.y", "messages[0].role.x", "messages[9]", "messages[9].role", "messages[-3]", "messages['0']", "messages.0",
    "messages.0.role", "messages[0]['role']", "messages[true].role", "messages[1.0]", "messages[none]", "messages[[]]", "{}[[]]",
    "'abc'[0]", "'abc'[-1]", "'abc'[3]", "'abc'.0", "{1: 'x'}[1]", "{1: 'x'}[true]", "{1: 'x'}[1.0]", "{1: 'x'}['1']", "(1, 2)[1]",
    "range(5)[2]", "range(5)[-1]", "range(5)[5]", "{'a': {'b': [1, {'c': 2}]}}.a.b[1].c",
]

SLICED = ["'abcdef'", "[1, 2, 3, 4, 5, 6]", "(1, 2, 3, 4, 5, 6)", "range(6)", "''", "[]"]
BOUNDS = ["", "0", "2", "-2", "9", "-9"]
STEPS = ["", ":2", ":-1", ":-2", ":0"]

PERCENT = [
    ("%s", "'a'"), ("%s", "1"), ("%s", "none"), ("%s", "[1]"), ("%s", "(1,)"), ("%s %s", "('a', 2)"), ("%s", "('a', 'b')"), ("%s %s", "'a'"),
    ("%d", "3"), ("%d", "3.9"), ("%d", "true"), ("%d", "'3'"), ("%5d|%-5d|%05d|%+d|% d", "(1, 2, 3, 4, 5)"), ("%.3d", "5"), ("%x %X %o", "(255, 255, 8)"),
    ("%#x %#o", "(255, 8)"), ("%#06x", "10"), ("%f", "1.5"), ("%.2f", "2.675"), ("%.0f", "2.5"), ("%8.3f|%-8.1f|%08.2f", "(1.5, 2.25, -3.5)"), ("%e", "12345.678"),
    ("%.2E", "0.00012"), ("%g", "1000000.0"), ("%g", "100000"), ("%g", "0.0001"), ("%g", "0.00001"), ("%.3g", "3.14159"), ("%G", "1e-10"), ("%r", "'it\\'s'"),
    ("%a", "'é'"), ("%c%c", "('x', 65)"), ("%%", "()"), ("%5%", "()"), ("%(a)s", "{'a': 1}"), ("%(a)5.1f", "{'a': 2.25}"), ("%(b)s", "{'a': 1}"), ("%10s|%-10s|", "('é', 'b')"),
    ("%.2s", "'abc'"), ("%*d", "(5, 3)"), ("%.*f", "(1, 2.25)"), ("%q", "1"), ("%", "1"), ("%s", "missing"), ("%d", "missing"), ("abc", "{}"), ("abc", "1"), ("abc", "()"),
    ("abc", "[1]"), ("%s", "{'a': 1}"), ("%f", "1e20"), ("%i", "-7"), ("%u", "7"), ("%+.1e", "0.0"), ("%s", "2.0"), ("%s", "true"), ("%+d", "-0"), ("%05s", "'a'"), ("%-05d|", "3"),
]

FORMATS = [
    ("{}", "1"), ("{} {}", "'a', 2"), ("{1} {0}", "'a', 'b'"), ("{0} {}", "1, 2"), ("{a}", "a=1"), ("{a.b}", "a={'b': 1}"), ("{a[b]}", "a={'b': 1}"), ("{0[1]}", "[1, 2]"),
    ("{!r}", "'a'"), ("{!s}", "none"), ("{!a}", "'é'"), ("{!x}", "1"), ("{{}}", ""), ("{", ""), ("}", ""), ("{}", ""), ("{b}", "a=1"), ("{:5}|", "'a'"), ("{:>5}|", "'a'"), ("{:^6}|", "'a'"),
    ("{:*^7}", "'ab'"), ("{:05}", "42"), ("{:5}|", "42"), ("{:<5}|", "42"), ("{:+}", "42"), ("{: }", "42"), ("{:,}", "1234567"), ("{:_}", "1234567"), ("{:x} {:X} {:o} {:b}", "255, 255, 8, 5"),
    ("{:#x} {:#b} {:#o}", "255, 5, 8"), ("{:#010x}", "255"), ("{:08b}", "5"), ("{:d}", "5"), ("{:d}", "5.0"), ("{:d}", "'5'"), ("{:c}", "65"), ("{:n}", "5"), ("{:e}", "12345.678"), ("{:.2f}", "2.675"),
    ("{:f}", "1"), ("{:.0f}", "0.5"), ("{:10.2f}|", "3.14159"), ("{:<10.2f}|", "3.14159"), ("{:010.2f}", "-3.14159"), ("{:,.2f}", "1234567.891"), ("{:012,.1f}", "1234.5"), ("{:%}", "0.256"), ("{:.1%}", "0.256"),
    ("{:g}", "1e10"), ("{:g}", "0.0001"), ("{:.3}", "3.14159"), ("{:.3}", "'abcdef'"), ("{:.3}", "1234.5"), ("{:10.3}|", "2.0"), ("{}", "2.0"), ("{:}", "2.5"), ("{:5}|", "2.5"), ("{:.1f}", "true"), ("{:5}|", "true"), ("{}", "true"),
    ("{:s}", "'a'"), ("{:s}", "1"), ("{:=+6}", "42"), ("{:0>6}", "42"), ("{:>{w}}|", "'a', w=4"), ("{:{}}|", "'a', 4"), ("{:5}|", "none"), ("{}", "none"), ("{:5}|", "[1]"), ("{}", "[1, 'a']"), ("{}", "{'a': 1}"), ("{:z}", "1"),
    ("{:.}", "1.0"), ("{:.2d}", "1"), ("{:_x}", "1234567"), ("{:06,}", "1234"), ("{:-}", "5"), ("{:<05}|", "3"), ("{:e}", "0.0"), ("{:G}", "1e-20"), ("{}", "missing"), ("{:4}|", "missing"), ("{.x}", "1"), ("{[x]}", "{'x': 'y'}"),
]

NUMBERS = [
    "0", "00", "07", "1_000", "0x1F", "0b101", "0o17", "0X_ff", "1.5", "1e3", "1E-3", "1.5e+2", "1_0.2_5", "1e400", ".5", "5.", "1__0", "123456789012345678901234567890",
    "9223372036854775807 + 1", "-9223372036854775808", "10 ** 30", "2 ** 100", "2 ** -1", "2 ** 0.5", "(-8) ** (1/3)", "0 ** 0", "0 ** -1", "-2 ** 2", "2 ** 3 ** 2", "7 // 2", "-7 // 2", "7 // -2",
    "-7 % 3", "7 % -3", "7.5 // 2", "-7.5 // 2", "7.5 % -2", "-0.0", "0.0 // 1", "-1 // 1e300", "1 / 3", "2 / 3", "1e16", "1e15", "123456789012345680.0", "0.0001", "0.00001", "1e-7", "1.0", "100.0", "1e22", "1e23",
    "5e-324", "1.7976931348623157e308", "0.1 + 0.2", "3.0 * 2", "10 / 2", "true + true", "true * 2.5", "-true", "+true", "- - 3", "--3", "not not 1", "1 - -1", "2 * -3", "1 if 0 else 2 if 0 else 3", "1 < 2 < 3", "1 < 3 < 2",
    "3 > 2 == 2", "1 == 1.0", "true == 1", "'a' == \"a\"", "[1] == (1,)", "none == false", "none is none", "'a' 'b'", "'a' ~ 1 ~ none", "1 ~ 2 + 3", "1 + 2 ~ 3", "'a' if true", "'a' if false", "('a' if false) is defined",
    "1 and 0 or 5", "'' or 'x'", "[] and 1", "not 1 == 2", "not 'a' in 'b'", "1 in [1] and 2 in [2]", "1, 2", "1,", "(1,)", "()", "(1)", "[1,]", "[1, 2,]", "{'a': 1,}", "{'a': 1, 'a': 2}", "{[1]: 2}", "{(1, 2): 3}", "{1: 2, 1.0: 3, true: 4}",
    "2.5|round", "3.5|round", "0.5|round", "1.5|round|int", "2.675|round(2)", "1234|round(-2)", "1250|round(-2)", "1350|round(-2)", "(1e300 * 1e10)", "1e308 * 10", "'1e3'|float", "'inf'|float", "'nan'|float", "'1_000'|int", "'0x1f'|int(0, 16)", "'0x1f'|int(0, 0)",
    "' 42 '|int", "'4.9'|int", "'-4.9'|int", "'1e2'|int", "'z'|int(7, 36)", "'٣'|int", "1e20|int", "'9' * 30", "'ab' * 0", "'ab' * -1", "2 * 'ab'", "[0] * 2", "2 * [0]", "(1,) * 2", "'ab' * 1.5", "5 % 0", "5 // 0", "5 / 0", "5.0 / 0", "5 % 0.0",
    "'%s' % 1 ~ 'x'", "999999999999999999 * 999999999999999999", "1e1000", "1 +", "+", "1 2", "'a' . 'b'", "{{", "1 <> 2", "a = 1", "1 ? 2 : 3", "!true", "a && b", "'unclosed", "[1, 2", "(1", "{'a' 1}", "f(,)", "x[", "x.", "x.1.2", "x..y", "a b", "not",
]

LANGUAGE = r'''
{% for x in [1, 2, 3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }};{% endfor %}
{% for x in [1, 2, 3] %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }};{% endfor %}
{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{{ loop.cycle('a', 'b') }}{% endfor %}
{% for x in [1, 2] %}{{ loop }}{% endfor %}{{ loop is defined }}
{% for x in [1, 2] %}{{ loop.nosuch is defined }}{{ loop['index'] }}{% endfor %}
{% for x in [] %}a{% else %}b{% endfor %}{% for x in [1] %}a{% else %}b{% endfor %}
{% for x in missing %}a{% else %}b{% endfor %}
{% for x in none %}a{% endfor %}
{% for x in 5 %}a{% endfor %}
{% for x in 'ab' %}{{ x }},{% endfor %}{% for x in {'k': 1} %}{{ x }}{% endfor %}
{% for k, v in {'k': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% for k, v in [(1, 2), [3, 4]] %}{{ k + v }}{% endfor %}
{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}
{% for a, b in ['xy'] %}{{ a }}{{ b }}{% endfor %}
{% for x in [1, 2, 3, 4] if x is even %}{{ loop.index }}/{{ loop.length }}:{{ x }} {% else %}none{% endfor %}
{% for x in [1, 3] if x is even %}{{ x }}{% else %}none{% endfor %}
{% for x in [1, 2, 3, 4] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}{% else %}else{% endfor %}
{% for x in [1] %}{% break %}{% else %}else{% endfor %}!
{% break %}
{% if true %}{% continue %}{% endif %}
{% for x in [[1, [2]], [3]] recursive %}{{ loop.depth }}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{% for x in [1] %}{{ loop([2]) }}{% endfor %}
{% for x in [1, 2] %}{% for y in [3, 4] %}{{ loop.index }}{{ x }}{{ y }} {% endfor %}{{ loop.index }};{% endfor %}
{% for x in [1, 2] %}{% set o = loop %}{% for y in [3] %}{{ o.index }}{% endfor %}{% endfor %}
{% set x = 0 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}
{% for i in [1, 2] %}{% if i == 1 %}{% set y = i %}{% endif %}{{ y is defined }}{% endfor %}
{% if true %}{% set x = 1 %}{% endif %}{{ x }}{% if false %}{% set messages = 1 %}{% endif %}{{ messages | length }}
{% set x = 1 %}{% with x = 2, y = x %}{{ x }}{{ y }}{% set z = 3 %}{% endwith %}{{ x }}{{ z is defined }}
{% with %}{% set a = 1 %}{{ a }}{% endwith %}{{ a is defined }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, d) = [3, 4] %}{{ c }}{{ d }}
{% set a, b = [1] %}
{% set x = 1, 2 %}{{ x }}
{% set x %}a{{ 1 }}b{% endset %}[{{ x }}]{{ x is string }}{{ x | length }}
{% set x | upper | trim %} abc {% endset %}[{{ x }}]
{% set x = 'a' %}{% set x = x ~ 'b' %}{{ x }}
{% set ns = namespace(a=1, b='x') %}{% set ns.a = 2 %}{% set ns.c = [1] %}{{ ns.a }}{{ ns.b }}{{ ns.c }}{{ ns.d is defined }}{{ ns }}
{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}{{ ns['a'] }}
{% set ns = namespace() %}{% for i in [1, 2, 3] %}{% set ns.n = (ns.n or 0) + i %}{% endfor %}{{ ns.n }}
{% set d = {} %}{% set d.a = 1 %}
{% set missing.a = 1 %}
{% set ns = namespace(a=1) %}{% set ns.a, b = 5, 6 %}{{ ns.a }}{{ b }}
{% set true = 1 %}
{% set x.y.z = 1 %}
{% set x = %}
{% set %}
{% macro f(a, b=2, c='x') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1) }}|{{ f(1, 3) }}|{{ f(a=1, c=4) }}|{{ f() }}
{% macro f(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}
{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, k=4) }}
{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f() }}{{ f(1) }}{{ f(x=1) }}
{% macro f(a) %}{{ a }}{{ caller(a, 'z') }}{% endmacro %}{% call(x, y) f('q') %}[{{ x }}{{ y }}]{% endcall %}
{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}{% set x = 1 %}{% call f() %}{{ x }}{% endcall %}
{% macro f() %}{{ caller is defined }}{% endmacro %}{{ f() }}
{% macro f() %}a{% endmacro %}{% call f() %}b{% endcall %}
{% macro f() %}{{ caller() }}{% endmacro %}{{ f() }}
{% call 1 %}{% endcall %}
{% macro f(x) %}{% if x > 0 %}{{ x }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(4) }}
{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}g{% endmacro %}{{ f() }}
{% macro f() %}{{ x }}{% endmacro %}{% set x = 1 %}{{ f() }}{% set x = 2 %}{{ f() }}
{% macro f() %}{% set x = 5 %}{{ x }}{% endmacro %}{% set x = 1 %}{{ f() }}{{ x }}
{% macro f(a, b=1) %}{% endmacro %}{{ f.name }} {{ f.arguments }} {{ f.catch_kwargs }} {{ f.catch_varargs }} {{ f.caller }} {{ f }} {{ f is callable }}
{% for i in [1, 2] %}{% macro f() %}{{ i }}{% endmacro %}{{ f() }}{% endfor %}
{% macro f(a=1, b) %}{% endmacro %}
{% macro f(a, a) %}{% endmacro %}
{% macro f() %}{{ messages | length }}{% endmacro %}{{ f() }}
{% macro f() %}  x  {% endmacro %}[{{ f() | trim }}]{{ f() ~ 'y' }}{{ f() + 'z' }}
{{ f(*[1, 2]) if false else 'ok' }}{% macro f(a, b, c=0) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(*[1, 2]) }}{{ f(*[1], **{'b': 5, 'c': 6}) }}{{ f(1, *[2], c=3) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(**{'a': 1, 'b': 2}) }}
{% filter upper %}ab{{ 'c' }}{% endfilter %}{% filter replace('a', 'b') | upper %}aa{% endfilter %}
{% filter nosuch %}x{% endfilter %}
{% if false %}{{ 1 | nosuch }}{% endif %}ok
{% if true %}{{ 1 | nosuch }}{% endif %}ok
{{ (1 | nosuch) if false else 'ok' }}
{{ 'ok' if true else (1 | nosuch) }}
{% if false %}{% for x in [1] %}{{ x | nosuch }}{% endfor %}{% endif %}ok
{{ 1 is nosuch if false else 'ok' }}
{% raw %}{{ x }}{% if %}{# c #}{% endraw %}|{%- raw -%}  a  {%- endraw -%}  b
{% raw %} {% endraw
{# comment #}a{#- c -#} b {# multi
line #}
{# open
{{ 1 }}{#}#}b
a {%- if true %} b {%- endif %} c
a {% if true -%} b {% endif -%} c
a {{- 1 -}} b {{+ 2 }}
  {% if true %}x{% endif %}y
  {%+ if true %}x{%+ endif %}y
{% if true +%}x{% endif %}
{% if true %}A{% elif x %}B{% else %}C{% endif %}{% if false %}A{% elif 1 %}B{% else %}C{% endif %}{% if 0 %}A{% elif '' %}B{% else %}C{% endif %}
{% if %}x{% endif %}
{% if true %}x
{% endif %}
{% if true %}x{% endfor %}
{% nosuch %}
{% do 1 %}
{% print 1 %}{% print 'a', 2 %}
{% block a %}x{{ messages | length }}{% endblock %}{{ self.a() }}
{% set x = 1 %}{% block a %}{{ x }}{% endblock %}
{% for i in [1] %}{% block a scoped %}{{ i }}{% endblock %}{% endfor %}
{% for i in [1] %}{% block a %}{{ i }}{% endblock a %}{% endfor %}
{% block a %}1{% endblock %}{% block a %}2{% endblock %}
{{ self }}{{ self.nosuch is defined }}
{% include 'x' %}
{% extends 'x' %}
{% if false %}{% include 'x' %}{% endif %}ok
{% import 'x' as y %}
{% autoescape false %}{{ '<' }}{% endautoescape %}
{% trans %}x{% endtrans %}
{% set j = joiner() %}{% for x in [1, 2, 3] %}{{ j() }}{{ x }}{% endfor %}{% set k = joiner('|') %}{{ k() }}{{ k() }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.next() }}{{ c.reset() }}{{ c.next() }}{{ c.pos }}{{ c.items }}
{{ cycler() }}
{{ dict(a=1) }}{{ dict([('a', 1)], b=2) }}{{ dict({'x': 1}) }}{{ dict() }}
{{ dict(1) }}
{{ range(3) }}{{ range(1, 4) | list }}{{ range(5, 0, -2) | list }}{{ range(2, 8, 3) }}{{ range(0) | list }}
{{ range(1, 5, 0) }}
{{ range(100001) | length }}
{{ range(100000) | length }}
{{ range('a') }}
{{ raise_exception('no') }}
{{ raise_exception() }}
{% if false %}{{ raise_exception('no') }}{% endif %}ok
{{ '<' | e ~ '<' }}{{ ('<' | e) + '<' }}{{ '<' | safe + '<b>' }}{{ ['<' | e] }}{{ ('<' | safe) | e }}{{ ('<' | e) | upper }}{{ '<' + ('>' | safe) }}
{{ ('a' | safe) is escaped }}{{ ('a<' | safe).replace('a', 'b') }}{{ ('a' | safe) | string is escaped }}{{ ('a' | safe).upper() is escaped }}
{{ "a\nb\tc\\d\"e\'f\x41\u00e9\101\q" }}{{ '\0' | length }}
{{ 'a
b' }}
{{ 'tab	x' }}
{{ "\ud83d\ude00" }}
{{ '\x4' }}
{{ 'a' is string and 1 is number }}{{ 1 is not string }}{{ not 1 is string }}{{ 1 is odd == true }}
{{ 'a' is in 'abc' }}{{ 'a' is in(['a']) }}{{ 4 is divisibleby 2 }}{{ 1 is sameas 1 }}{{ x is defined and x }}
{{ 1 is odd is true }}
{{ messages | map(attribute='role') | join(',') }}{{ messages | map('length') | list }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}
{% set g = [1, 2] | map('string') %}{{ g | list }}{{ g | list }}
{% set g = [1, 2] | select %}{% for x in g %}{{ x }}{{ loop.last }}{% endfor %}
{{ ([1, 2] | map('string')) | length }}
{{ ([1, 2] | map('string'))[0] }}
{{ ([1, 2] | map('string')) | first }}{{ ([1] | select) is iterable }}{{ ([1] | select) is sequence }}{{ ([0] | select) and true }}
{{ ([1, 2] | reverse) | last }}
{{ [1, 2, 3] | random is number }}{{ [] | random is defined }}
{% for g in [{'a': 1, 'b': 'X'}, {'a': 2, 'b': 'x'}] | groupby('b') %}{{ g.grouper }}{{ g.list | length }}{{ g[0] }}{% endfor %}{% for k, v in [{'a': 1}] | groupby('a') %}{{ k }}{{ v }}{% endfor %}
{{ [{'a': {'b': 2}}, {'a': {'b': 1}}] | sort(attribute='a.b') | map(attribute='a.b') | list }}{{ [[2, 1], [1, 2]] | sort(attribute=1) }}{{ [[2, 1], [1, 2]] | map(attribute='0') | list }}
{{ [1, 'a'] | sort }}
{{ [none, 1] | max }}
{{ [[1], [2]] | sum(start=[]) }}{{ ['a'] | sum }}
{{ messages[0].content[1:] ~ messages | length }}{{ messages[0]['role'] | upper | lower | length }}
{{ 'abc' | map('upper') | join }}{{ {'a': 1} | map('upper') | list }}{{ 'cab' | sort }}{{ 'aab' | unique | join }}{{ 'abc' | first }}{{ 'abc' | last }}
{{ 'The quick brown fox' | truncate(9) }}|{{ 'The quick brown fox' | truncate(9, true) }}|{{ 'The quick' | truncate(7) }}|{{ 'The quick brown' | truncate(9, end='', leeway=0) }}
{{ 'The quick brown-fox jumps over verylongwordindeed' | wordwrap(10) }}
{{ 'a b c\n\nd e f g' | wordwrap(3, wrapstring='|') }}{{ 'abcdefghij' | wordwrap(4, false) }}{{ 'well-known thing' | wordwrap(6, break_on_hyphens=false) }}
{{ 'a b' | urlencode }}{{ {'a b': 'c&d', 'e': 1} | urlencode }}{{ [('x', 1)] | urlencode }}{{ 'é/?=' | urlencode }}
{{ {'a': 1, 'b': none, 'c': '<'} | xmlattr }}{{ {'a b': 1} | xmlattr }}
{{ 0 | filesizeformat }}{{ 1 | filesizeformat }}{{ 1000 | filesizeformat }}{{ 1024 | filesizeformat(true) }}{{ 13000000 | filesizeformat }}{{ '5' | filesizeformat }}
{{ '<p>a &amp; b</p> <!-- c --> d' | striptags }}{{ "It's o'neil mcdonald-smith (abc)" | title }}{{ "they're BILL's friends" | title }}
{{ {'b': [1, {'c': none}], 'a': {}, 'd': []} | tojson(indent=2) }}{{ {'a': 1} | tojson(indent='--') }}{{ [1, 2] | tojson(indent=0) }}
{{ {1: 2, none: 3, true: 4, 1.5: 5} | tojson }}{{ {(1, 2): 3} | tojson }}
{{ [1e16, 1e-7, 1.0, 'inf' | float, 'nan' | float] | tojson }}{{ (1, 2) | tojson }}{{ 'é\u2028<>&\'"\\/\x7f\x01' | tojson }}{{ 'é😀' | tojson(ensure_ascii=true) }}
{{ missing | tojson }}
{{ range(3) | tojson }}
{{ messages | tojson(indent=1, ensure_ascii=false) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ {'b': 1} | tojson(nosuch=1) }}
{{ 'a' | upper() }}{{ 'a' | upper(1) }}
{{ 'ab' | replace('a') }}
{{ 'ab' | center(width=6) }}|{{ 'ab' | center(nosuch=6) }}
{{ ['a', 1, none, 2.0, true, 'it\'s', "q\"", [], {}, (), 'é', '\u200b', '\n', '\x7f', '\xad'] }}
{{ {'a': {'b': ('c',)}} }}{{ [missing] }}{{ [range(2)] }}{{ {missing: 1} }}
{{ missing is defined }}{{ missing is none }}{{ missing == none }}{{ missing == missing }}{{ missing | default('d') }}{{ missing ~ 'a' }}{{ missing | upper }}{{ missing | list }}{{ missing | length }}{{ missing | join }}{{ not missing }}{{ missing or 1 }}
{{ missing + 1 }}
{{ 1 + missing }}
{{ missing < 1 }}
{{ missing in [1] }}{{ 1 in missing }}
{{ -missing }}
{{ missing in 'abc' }}
{{ missing[0] }}
{{ missing[1:] }}
{{ none[1:] }}
{{ {}[1:] }}
{{ [1, 2]['a':] }}
{{ 'abc'[1.5:] }}
{{ 'abc'[missing:] }}
{{ 'abc'[true:] }}{{ [1, 2, 3][none:none] }}
{{ x[1, 2] is defined if x is defined else 'no' }}{{ {(1, 2): 'a'}[1, 2] }}
{{ 1 in 'abc' }}
{{ 1 in 5 }}
{{ [] in {} }}
{{ 'a' < 1 }}
{{ [1, 2] < [1, 3] }}{{ (1,) < (1, 0) }}{{ 'a' < 'B' }}{{ [1] < [2, 'a'] }}{{ true < 2 }}{{ 'é' > 'z' }}
{{ none < 1 }}
{{ {} < {} }}
{{ 'a'.__class__ }}{{ ''.__class__.__mro__ is defined }}
{{ ''.__class__.__mro__ }}
{{ messages.__class__() }}
{{ range.__name__ is defined }}{{ messages[0].__len__ is defined }}
{{ strftime_now('%Y') is string }}{{ strftime_now is callable }}{{ raise_exception is callable }}
{{ lipsum is callable }}{{ loop }}{{ super is defined }}
{{ [1,2,3]|length + 1 }}{{ [1]|first * 3 }}{{ -1|abs }}{{ (-1)|abs }}{{ 2|float ** 2 }}{{ 'a'|upper ~ 'b'|upper }}
{{ 'x'.join(messages | map(attribute='role')) }}{{ ' '.join(['a', 'b']) | upper }}{{ ('%s' | format('a')) ~ '!' }}
{{ 'a,b'.split(',')[0] }}{{ 'a,b'.split(',')[-1].upper() }}{{ 'a'.upper().lower().title() }}{{ 'abc'[1:].upper()[::-1] }}
{% set x = messages %}{% set x = x + [{'role': 'tool'}] %}{{ x | length }}{{ messages | length }}{{ x[-1].role }}
{% set x = {'a': 1} %}{% set x = dict(x, b=2) %}{{ x }}{{ x.a }}
{%- for m in messages -%}{%- if m['role'] == 'user' -%}U:{{ m['content'] }}{%- else -%}A:{{ m['content'] }}{%- endif -%}{%- endfor -%}
{% for m in messages %}{{ loop.index0 }}{% if not loop.last %}, {% endif %}{% endfor %}{% if messages[-1].role == 'assistant' %}!{% endif %}
{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{% for m in messages[1:] %}{{ m.role }}{% endfor %}{% for m in messages | reverse %}{{ m.role }}{% endfor %}
{% if messages[0].content is string and messages[0].content is not mapping and messages is sequence %}y{% endif %}{{ 'role' in messages[0] }}{{ messages[0].role in ['user', 'system'] }}
{% if messages[0].tool_calls is defined and messages[0].tool_calls %}a{% endif %}{% if messages[0].get('tool_calls') %}b{% endif %}{% if messages[0]['tool_calls'] %}c{% endif %}d
{{ messages[0].content.split('it')[0] ~ '|' ~ messages[0].content.split('it')[-1] }}{{ messages[0].content | replace('<', '&lt;') }}{{ messages[0].content | length }}{{ messages[1].content | length }}
{% generation %}x{% set y = 1 %}{% endgeneration %}{{ y is defined }}
{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}
{% generation %}x
{% for x in [1] %}{% generation %}{% break %}{% endgeneration %}{% endfor %}
{{ 1 }}{{ 2
}}{{
3 }}
{{}}
{{ }}
{%%}
{% %}
{{ 1 }
{{ 1 %}
{% if 1 }}
{{ "%}" }}{{ '}}' }}{% if '%}' %}x{% endif %}
{{ {'a': {'b': 1}}['a']['b'] }}{{ {'a': {}}}}
{{ (1 }}
{{ 1) }}
{{ [1} }}
{{ x | }}
{{ | x }}
{{ x is }}
{{ 'a' | upper | }}
{{ @ }}
{{ a $ b }}
{{ é }}{% set é = 1 %}{{ é }}
{{ a1_b is defined }}{{ _x is defined }}
{{ True }}{{ False }}{{ None }}{{ true }}{{ TRUE is defined }}{{ null is defined }}
{{ loop.index }}
{% for loop in [1] %}{% endfor %}
{% for x in [1] %}{% set loop = 2 %}{{ loop }}{% endfor %}
{% for x in [3, 4] %}{% set x = x * 2 %}{{ x }}{{ loop.index }}{% endfor %}
{% for x in [1, 2] -%}  {{ x }}  {%- endfor %}
{% set x = 2 %}{{ -2 ** x }} {{ (-2) ** x }} {{ -x ** 2 }}
{% macro f() %}{{ y }}{% endmacro %}[{{ f() }}]{% set y = 1 %}[{{ f() }}]
{% for i in [1,2] %}{% set z = i %}{% endfor %}{{ z is defined }}
{% set z = 0 %}{% for i in [1,2] %}{{ z }}{% set z = i %}{{ z }}{% endfor %}{{ z }}
{% if false %}{% set q = 1 %}{% endif %}{{ q is defined }}{{ q }}
{% for i in [1,2] %}{% if loop.first %}{% set q = 'a' %}{% else %}{{ q }}{% endif %}{% endfor %}
{% set a = 1 %}{% block b %}{{ a }}{% set a = 2 %}{{ a }}{% endblock %}{{ a }}
{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = ns.x + 1 %}{% endmacro %}{{ f() }}{{ f() }}{{ ns.x }}
{% macro outer() %}{% macro inner() %}i{{ varargs }}{% endmacro %}{{ inner(1) }}{% endmacro %}{{ outer() }}
{% macro f(x) %}{{ caller(x) if caller else 'none' }}{% endmacro %}{{ f(1) }}{% call(y) f(2) %}c{{ y }}{% endcall %}
{% call(y=3) (messages[0].get)('role') %}{% endcall %}
{% macro f() %}{{ caller(1) }}{% endmacro %}{% call(a, b='q') f() %}{{ a }}{{ b }}{% endcall %}
{% with a = 1 %}{% set b = a %}{% endwith %}{{ b is defined }}{{ a is defined }}
{% filter indent(2) %}a
b{% endfilter %}
{% for x in range(3) %}{% for y in range(x) %}{{ x }}{{ y }}{% else %}e{% endfor %},{% endfor %}
{% for k, v in messages[0]|dictsort %}{{ k }}={{ v }};{% endfor %}
{% for m in messages %}{{ m|tojson }}{{ ',' if not loop.last }}{% endfor %}
{{ messages|map('tojson')|join('\n') }}{{ messages|map(attribute='content')|map('trim')|map('length')|list }}
{{ messages|selectattr('role','ne','user')|list|tojson }}{{ messages|rejectattr('role','in',['user','x'])|map(attribute='role')|list }}
{{ messages|sum(attribute='nothing') }}
{{ messages|groupby('role')|map('last')|map('length')|list }}
{{ [1,2,3]|select('divisibleby', 2)|list }}{{ [1,2,3]|reject('in', [1])|list }}{{ ['a',1]|select('string')|list }}{{ [[1],[2]]|map('first')|list }}{{ [3,1]|map('string')|sort|join }}
{{ ['x']|map('replace','x','y')|list }}{{ [' a ']|map('trim')|first }}{{ ['ab']|map('first')|list }}{{ [{'a':{'b':1}}]|map(attribute='a.b')|list }}{{ ['1','2']|map('int')|sum }}
{{ {'a':1}|items|list }}{{ {'b':2,'a':1}|dictsort|first }}{{ ({'a':1}|items|list)[0][1] }}
{{ 'abc'|list|join('-') }}{{ 'abc'|first|upper }}{{ 'abc'|last }}{{ 'a-b'.split('-')|last }}{{ ('a b c'.split()|length) * 2 }}
{{ '%s' % none }}{{ '%s' % [1,2] }}{{ '%s,%s' % ('a','b') }}{{ '%d%%' % 5 }}{{ '%(x)s' % {'x':1} }}{{ '%5.2f|%-6s|%06d' % (3.14159,'ab',42) }}
{{ 'abc' * 2 ~ 'x' }}{{ ['a'] * 3 }}{{ (1,2) + (3,) }}{{ [1] + [2] == [1,2] }}{{ 'b' > 'a' }}{{ [1,2] > [1] }}
{{ 10 // 3 }}{{ -10 // 3 }}{{ 10 % -3 }}{{ 10.0 / 4 }}{{ 2 ** 10 }}{{ 7 // 2.0 }}{{ 1e3 }}{{ 1.50 }}{{ 100000000000000000000.0 }}{{ 0.1 * 3 }}{{ 1 / 3 }}
{{ true + 1 }}{{ true and 'x' }}{{ '' or 'y' }}{{ none or 0 }}{{ not [] }}{{ 1 < 2 < 3 }}{{ 3 > 2 > 2 }}{{ 'a' in {'a':1} }}{{ 2 not in [1] }}
{{ (messages[0] is mapping) and (messages is iterable) }}{{ 5 is between }}
{{ 'x' is eq 'x' }}{{ 3 is ge 2 }}{{ 'A' is lower }}{{ 'abc' is in 'xabcx' }}{{ [] is empty }}
{{ 1.0 is integer }}{{ 1 is float }}{{ '1' is number }}{{ true is integer }}{{ none is string }}{{ (1,) is sequence }}
{{ "a'b" }}{{ ["a'b", 'a"b', 'a\'"b'] }}{{ {'k': "v'"} }}{{ ['\\', '\t', '\r', '\x00', '\u00e9', '\u3042'] }}
{{ messages[0].items()|list }}{{ messages[0].keys()|list|sort }}{{ messages[0].values()|list }}{{ messages[0].get('x', []) }}
{{ ''|default('d') }}|{{ ''|default('d', true) }}|{{ x|default }}|{{ x.y|default('z') }}
{{ x.y is defined }}
{{ messages[0].x.y is defined }}
{{ messages[0]['x'] is defined }}{{ messages[0].x|default('n') }}{{ messages[7] is defined }}{{ messages[7]|default('n') }}
{{ (x or {}).y|default('q') }}{{ x ~ 'a' }}{{ x|int if false }}{{ [x]|join }}{{ x == '' }}{{ x|e }}
{{ x|int }}
{{ x|float }}
{{ x|abs }}
{{ x|sort }}{{ x|unique|list }}{{ x|reverse|list }}{{ x|first is defined }}{{ x|sum }}{{ x|batch(2)|list }}{{ x|map('upper')|list }}{{ x|tojson|length if false }}
{{ x|dictsort }}
{{ x|items|list }}{{ x|replace('a','b') }}{{ x|trim }}{{ x|title }}{{ x|wordcount }}{{ x|string|length }}{{ x|center(3) }}|
{{ x|indent }}
{{ x|wordwrap }}
{{ x|round }}
{{ 'Hello'|center(11)|replace(' ', '.') }}{{ 'Hello'.center(10, '*') }}{{ 'x'.rjust(3,'0') }}{{ '5'.zfill(3) }}{{ '-5'.zfill(4) }}{{ 'a\tb'.expandtabs(4) }}
{{ 'a.b.c'.rsplit('.', 1) }}{{ 'k=v=w'.partition('=') }}{{ 'k=v=w'.rpartition('=') }}{{ 'a\nb\r\nc'.splitlines() }}{{ 'xay'.strip('xy') }}{{ 'test.py'.removesuffix('.py') }}{{ 'abc'.translate('abc'.maketrans('a','b')) }}
{{ 'abc'.isalpha() }}{{ 'ab1'.isalnum() }}{{ '１'.isdigit() }}{{ 'Ⅷ'.isnumeric() }}{{ 'ǅ'.istitle() }}{{ 'ß'.isupper() }}{{ ''.isspace() }}{{ 'a_1'.isidentifier() }}{{ '\n'.isprintable() }}
{{ 'ŉ'.upper() }}{{ 'ﬁ'.capitalize() }}{{ 'İ'.lower() | length }}{{ 'ΑΣ'.lower() }}{{ 'o\'neil'.title() }}{{ 'ﬁ x'.title() }}{{ 'ǆ'.capitalize() }}{{ 'ʰA'.title() }}{{ 'ªb'.istitle() }}
{{ 12345.678 | round(1) }}{{ 1e100 }}{{ 123456789.123456789 }}{{ 1e-10 }}{{ 3.0e0 }}{{ -1.5e-5 }}{{ 2.0 ** 0.5 }}{{ 10 ** -2 }}{{ 1_000.5 }}
{{ [1.0, 2.50, 1e16, 1e-5, -0.0] }}{{ {'f': 0.1} }}{{ (0.1,) }}{{ [true, none, 1.0]|tojson }}{{ 1e16|tojson }}{{ 1e22|int }}{{ 0.1 + 0.7 }}
{{ range(10)[2:8:3]|list }}{{ range(5)|last }}{{ range(3)|reverse|list }}{{ 2 in range(3) }}{{ range(3) == range(0,3) }}{{ range(0) and 1 }}{{ range(1,0)|list }}
{{ 'abcdef'[4:1:-1] }}{{ 'abcdef'[::-2] }}{{ [1,2,3,4][-3:-1] }}{{ [1,2,3][5:] }}{{ 'añb'[1] }}{{ 'añb'[::-1] }}{{ (1,2,3)[1:] }}{{ 'abc'[-5:2] }}
{%- if messages -%} y {%- endif -%} {{ ' z ' -}}   w
{#- a -#}  b  {#- c #}  d {# e -#}  f
{{- 'a' }} b {{ 'c' -}} d
{% set s = 'a' -%}   b {%- set t = 'c' %} d
{% if true %}a{% else %}b{% endif %}{% if not true %}a{% else %}b{% endif %}{% if true and not false %}c{% endif %}{% if (1,) %}d{% endif %}{% if 0.0 %}e{% endif %}{% if '0' %}f{% endif %}
{% if x is defined %}a{% elif messages|length == 2 %}b{% endif %}{% if x %}c{% endif %}{% if not x %}d{% endif %}
{% for a in [1,2,3] if a > 1 %}{{ loop.index }}{{ loop.first }}{{ loop.previtem }}{{ a }};{% endfor %}
{% for a in [1,2,3] if loop %}{{ a }}{% endfor %}
{% for a, b in {'x': 1, 'y': 2}|dictsort(reverse=true) %}{{ a }}{{ b }}{% endfor %}{% for i, (a, b) in [(1,(2,3))] %}{{ i+a+b }}{% endfor %}
{% for x in [1,2,3,4,5] %}{% if x % 2 %}{% continue %}{% endif %}{{ x }}{% if x >= 4 %}{% break %}{% endif %}{% endfor %}
{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.l|join(',') }}{{ ns }}
{% set ns = namespace(a=1) %}{{ ns.a }}{{ ns['a'] }}{{ ns.b|default('n') }}{{ ns is mapping }}{{ ns is iterable }}{{ ns|string }}
{{ namespace(1) }}
{{ namespace([('a', 1)]).a }}
{{ dict(a=1).a }}{{ dict(a=1, **{'b': 2}) }}{{ dict({'a': 1}, a=2) }}{{ {**{'a':1}} }}
{{ [*[1,2]] }}
{{ messages[0].role if messages else 'none' }}{{ 'a' if false }}|{{ ('a' if false)|default('q') }}{{ 'x' if true else y.z }}
{{ joiner }}
{{ cycler(1,2).next() }}{% set c = cycler(1,2) %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}
{% for i in range(4) %}{{ loop.cycle('o','e') }}{{ loop.changed(i // 2) }}{% endfor %}
{% for i in [1] %}{{ loop.cycle() }}{% endfor %}
{% for x in [[1,[2]],3] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth0 }}{% endfor %}
{{ '<a href="x">' | e }}{{ '&amp;' | e }}{{ '<b>' | safe }}{{ '<b>x</b>' | striptags }}{{ 'a & b' | urlencode }}{{ '<' | forceescape | e }}{{ ('<' | e)[0] }}{{ ('<' | e) | length }}
{{ ('<a>' | safe) ~ '<b>' }}{{ ('<a>' | safe) + '<b>' }}{{ '<x>' + ('<a>' | safe) }}{{ ('<%s>' | safe) % '<' }}{{ ('{}' | safe).format('<') }}{{ ('-' | safe).join(['<', '>']) }}{{ [('<' | safe), '<'] | join }}{{ ('<' | safe) * 2 }}
{{ 'text' | truncate(3) }}{{ 'some longer text here' | truncate(10) }}|{{ 'abcdefghijklmno' | truncate(8, true) }}|{{ 'a b c d' | truncate(3, false, '', 0) }}
{{ 'a b  c' | wordcount }}{{ 'aaa bbb ccc' | wordwrap(7) }}{{ 'aaaaaaaaaa' | wordwrap(3) }}{{ 'a-b-c-d' | wordwrap(3) }}{{ ' a b ' | wordwrap(2) }}
{{ 123456 | filesizeformat }}{{ 2048 | filesizeformat(binary=true) }}{{ 1e30 | filesizeformat }}{{ -5 | filesizeformat }}
{{ {'a': [1, 2.0, none, true, 'é"\n'], 'b': {}} | tojson }}{{ [] | tojson(indent=2) }}{{ {'a': []} | tojson(indent=4) }}{{ 'é' | tojson(ensure_ascii=True) }}
{{ messages | tojson(indent=2) }}
{{ {'b': 1, 'a': {'d': 1, 'c': 2}} | tojson(sort_keys=True, indent=1) }}{{ {1: 1, 'a': 2} | tojson(sort_keys=True) }}
{{ {'a': messages|map(attribute='role')} | tojson }}
{{ namespace(a=1) | tojson }}
{{ (messages | tojson) | length }}{{ (1,(2,)) | tojson }}{{ 'a\u2028</script>' | tojson }}
{{ raise_exception('a' ~ 1) }}
{{ raise_exception(1) }}
{{ strftime_now() }}
{{ strftime_now('x') }}{{ strftime_now('') }}
{{ strftime_now(1) }}
{% set x = raise_exception %}{{ x is callable }}
{{ messages.append(1) }}
{{ messages[0].update({}) }}
{{ messages[0].setdefault('role') }}
{{ messages.sort }}|{{ messages.count(messages[0]) }}{{ messages.index(messages[1]) }}
{{ ''.join([]) }}{{ ','.join(messages[0]) }}{{ 'x'.join({'a':1}.values()) }}
{{ 'a'|attr('upper') is callable }}{{ messages[0]|attr('role') is defined }}
{{ [1, 2] | first | string | length }}{{ ([1, 2] | first).bit_length() }}{{ 1.5.is_integer() }}
{{ 5.real }}{{ (5).imag }}{{ 2.5.real }}
{{ 0xff }}{{ 0b11 }}{{ 0o7 }}{{ 1_0 }}{{ 1e1_0 }}
{{ 'a' 'b' "c" }}{{ 'a' ~ 'b' 'c' }}{{ ('a'
'b') }}
{{ '{{' }}{{ "{%" }}{{ '#}' }}{{ '%}' }}{# {{ #}{% raw %}{{ x }}{% {# #}{% endraw %}
{% raw -%}  x  {%- endraw %}|{%- raw %}  y  {% endraw -%}  |
{% if true -%}

a

{%- endif %}
b
  {%- for i in [1,2] %}
  {{ i }}
  {%- endfor %}
c
    {#- comment -#}
d
'''

WHITESPACE = [
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc", "a\rb\r", "a\n\n", "a\n\n\n", "\n\na", "  {{ 1 }}\n  {{ 2 }}\n",
    "{% if true %}\n\n\nx{% endif %}", "{% set x = 1 %}\n{% set y = 2 %}\n{{ x }}\n", "a {#- c -#}\n b", "a\n {# c #}\n b", "\t{% if true %}\tx\t{% endif %}\t\n", "x{%- if true -%}\n\n y \n\n{%- endif -%}z",
    "{{ 1 -}}\n\n{{ 2 }}", "{{ 1 }}\n{{- 2 }}", "{% raw %}\n  {{ x }}\n{% endraw %}\ny", "{%- raw %}\n a \n{%- endraw %}\ny", "  {% raw %}a{% endraw %}  ", "{{ 'a\r\nb' }}", "{{ 'a\rb' | length }}",
    "{% for m in messages %}\n    {{ m.role }}\n{% endfor %}\n", "{% for m in messages %}\n    {%- if loop.first %}\n        F\n    {%- endif %}\n    {{ m.role }}\n{% endfor %}", "x  {%+ if true %}y{% endif %}", "  {%+ if true %}\n  y\n  {%+ endif %}\nz",
    "{% if true +%}\nx{% endif +%}\ny", "{% if true %} \nx{% endif %}", "a{# c +#}\nb", "a{# c #}\nb", "a\n\t {#- c #}\nb", "\u00a0{% if true %}x{% endif %}", "a\u00a0\n{%- if true %}x{% endif %}", "\ufeffa{{ 1 }}", "a\u2028{% if true %}b{% endif %}", "\x0b{%- if true %}x{% endif -%}\x0c\x1cy",
]


def snippets():
    yield from (f"{{{{ {value} | {name} }}}}" for value, name in itertools.product(VALUES, FILTERS))
    yield from (f"{{{{ {value} is {name} }}}}" for value, name in itertools.product(VALUES, TESTS))
    yield from (f"{{{{ {one} {sign} {two} }}}}" for one, sign, two in itertools.product(PAIRS, OPERATORS, PAIRS))
    yield from (f"{{{{ {text}.{name} }}}}" for text, name in itertools.product(TEXTS, METHODS))
    yield from (f"{{{{ {expression} }}}}" for expression in OTHER_METHODS + NUMBERS)
    for value in SLICED:
        yield "{{ " + "|".join(f"{value}[{a}:{b}{c}]" for a, b, c in itertools.product(BOUNDS, BOUNDS, STEPS[:-1])).replace("]|", "] ~ '|' ~ ") + " }}"
        yield "{{ " + value + "[::0] }}"
    yield from (f"{{{{ {json.dumps(pattern)} % {values} }}}}" for pattern, values in PERCENT)
    yield from (f"{{{{ {json.dumps(pattern)}.format({values}) }}}}" for pattern, values in FORMATS)
    yield from LANGUAGE.strip("\n").split("\n")
    yield from WHITESPACE


def rendered(template):
    try:
        # Some filters change what they are given.
        text = _compile_jinja_template(template).render(**copy.deepcopy(CONTEXT))
        # Half a character is no text that could be encoded.
        text.encode()
        return text
    except Exception:
        return None


def main():
    here = pathlib.Path(__file__).resolve()
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here.parents[2] / "tests" / "data" / "jinja" / "snippets.json"
    cases = []
    for template in dict.fromkeys(snippets()):
        text = rendered(template)
        # Addresses change, and complex numbers are not supported.
        if text is None or not re.search(r" at 0x[0-9a-f]+|\d\+\d.*j\)", text):
            cases.append([template, text])
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    path.write_text(f'{{"context": {json.dumps(CONTEXT, ensure_ascii=False)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(cases)} cases, {sum(text is None for _, text in cases)} of them refusals")


if __name__ == "__main__":
    main()
