"""Chat templates: the same text as transformers for well-known shapes, and nothing but text for hostile ones."""

from __future__ import annotations

import datetime

import pytest
from swarmnode.kernels import chat
from swarmnode.kernels.chat import ChatTemplate
from swarmnode.protocol.errors import ConfigError, CorruptCheckpoint

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye ünï"},
]

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

CHATML = """{%- set ns = namespace(count=0) %}
{% for m in messages %}
    {% set ns.count = ns.count + 1 %}
    {% if m.content is string %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endif %}
    {% if m.role == 'assistant' %}{% generation %}!{% endgeneration %}{% endif %}
    {% if loop.last %}{% break %}{% endif %}
{% endfor %}{{ ns.count }} {{ messages[0] | tojson }} {{ tools | tojson(indent=2) }}
{{ messages | map(attribute='role') | join(',') }} {{ 'a\nb' | indent(2) }} {{ 'aXb'.replace('X', 'é') }}
{{- messages[0].items() | list | length }} {{ 'x' if strftime_now is defined else 'y' }} {{ [1, 2] }}"""


@pytest.mark.parametrize("source", [GEMMA, CHATML], ids=["gemma", "chatml"])
def test_renders_as_transformers_does(source):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<bos>", "eos_token": "<eos>", "tools": [{"name": "f", "π": [1, None]}]}
    expected = utils._compile_jinja_template(source).render(messages=MESSAGES, add_generation_prompt=True, **variables)
    ours = ChatTemplate(source).render(MESSAGES, **variables)
    assert ours.replace(" y ", " x ") == expected  # transformers always defines strftime_now


def test_the_date_is_the_callers():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    assert template.render([], now=datetime.datetime(2026, 11, 21)) == "21 Nov 2026"


def test_a_template_that_refuses_is_the_users_to_solve():
    with pytest.raises(ConfigError, match="roles must alternate"):
        ChatTemplate(GEMMA).render([{"role": "assistant", "content": "x"}], bos_token="")
    with pytest.raises(ConfigError, match="failed on these messages"):
        ChatTemplate("{{ messages[0]['content'] + 1 }}").render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range.__self__ }}{{ _tick.__self__.globals }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ self._TemplateReference__context.environment.globals['range'].__globals__ }}",
        "{% for f in [].__class__.__base__.__subclasses__() %}{{ f }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list | first .__mro__ }}",
        "{{ joiner('').__init__ }}",
    ],
)
def test_templates_cannot_reach_python(source):
    """Known server-side template injections: each fails, none prints an object of the interpreter."""
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "x"}])
    except (CorruptCheckpoint, ConfigError):
        return
    assert "<class" not in text
    assert "object at" not in text
    assert "function" not in text
    assert "root:" not in text


DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = EXPR %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10000000000 * 'x' }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ 'x'.center(99999999999) }}{{ 'x'.zfill(99999999999) }}",
        "{{ 'x' | center(99999999999) }}",
        "{{ 'x\ny' | indent(99999999999) }}",
        "{{ 'x' | format(1) }}",
        "{{ range(99999999999) | list }}",
        "{{ {} | tojson(indent=99999999999) }}",
        DOUBLE.replace("EXPR", "ns.x + ns.x"),
        DOUBLE.replace("EXPR", "ns.x ~ ns.x"),
        DOUBLE.replace("EXPR", "[ns.x, ns.x]"),
        DOUBLE.replace("EXPR", "[ns.x, ns.x] | tojson"),
        DOUBLE.replace("EXPR", "[ns.x, ns.x] | join"),
        DOUBLE.replace("EXPR", "ns.x.replace('a', 'aa').replace('b', 'bb')"),
        DOUBLE.replace("EXPR", "ns.x | replace('a', 'aa') | replace('', 'bb')"),
        DOUBLE.replace("EXPR", "[ns.x, ns.x] | string"),
        DOUBLE.replace("EXPR", "{'a': ns.x, 'b': ns.x}"),
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'a' | replace('a', 'b' * 16000000) | replace('b', 'cc') }}",
    ],
)
@pytest.mark.timeout(20)
def test_work_and_size_are_bounded(source):
    with pytest.raises((CorruptCheckpoint, ConfigError)):
        ChatTemplate(source).render([])


def test_the_source_is_bounded_and_checked():
    with pytest.raises(CorruptCheckpoint, match="characters"):
        ChatTemplate("x" * (chat.MAX_SOURCE + 1))
    for source in ("{% for %}", "{{", "{{ x | nosuchfilter }}", "{% if " + "(" * 5000):
        with pytest.raises(CorruptCheckpoint, match="not valid"):
            ChatTemplate(source)


def test_messages_must_be_plain_values():
    with pytest.raises(ConfigError, match="plain JSON"):
        ChatTemplate("x").render([{"role": object()}])


def test_a_long_conversation_fits_the_budget():
    long = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(1000)]
    assert len(ChatTemplate(GEMMA).render(long, bos_token="<bos>")) > 1_000_000 - 1000
