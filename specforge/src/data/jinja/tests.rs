//! The whole language against texts that Jinja2 made, and templates that would take everything.

use std::path::Path;

use super::*;

const DAY: Day = Day { year: 2024, month: 7, day: 26 };

fn context(json: &serde_json::Value) -> Context {
    let members = json.as_object().unwrap().iter();
    members.map(|(name, value)| (Arc::from(name.as_str()), Value::from_json(value).unwrap())).collect()
}

fn rendered(source: &str, context: &Context) -> Result<String, Fault> {
    let template = compile(source).map_err(|fault| *fault)?;
    render(&template, context, None, &Limits::new(100), DAY).map_err(|(fault, _)| *fault)
}

/// Made by scripts/golden/jinja_snippets.py: the same text, or a refusal where Jinja2 refuses.
#[test]
fn snippets_render_as_in_jinja2() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/jinja/snippets.json");
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let context = context(&golden["context"]);
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 5000);
    let mut wrong = Vec::new();
    for case in cases {
        let (source, want) = (case[0].as_str().unwrap(), case[1].as_str());
        let got = rendered(source, &context);
        if got.as_ref().ok().map(String::as_str) != want {
            wrong.push(format!("{source}\n  want {want:?}\n  got  {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn hostile_templates_end() {
    let context = context(&serde_json::json!({"messages": [{"role": "user", "content": "hi"}]}));
    let grow = |start: &str, step: &str, end: &str| {
        format!(
            "{{% set ns = namespace(s={start}) %}}{{% for i in range(999) %}}{{% set ns.s = {step} %}}{{% endfor %}}{{{{ {end} }}}}"
        )
    };
    let limited = [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".to_owned(),
        "{{ 'x' * 10 ** 9 }}".to_owned(),
        "{{ [0] * 10 ** 30 }}".to_owned(),
        grow("'x'", "ns.s + ns.s", "ns.s"),
        grow("'x'", "ns.s ~ ns.s", "1"),
        grow("[1]", "ns.s + ns.s", "1"),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}".to_owned(),
        "{% block a %}{{ self.a() }}{% endblock %}".to_owned(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}".to_owned(),
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}".to_owned(),
        "{{ 'a'.center(10 ** 12) }}".to_owned(),
        "{{ 'a' | center(10 ** 9) }}".to_owned(),
        "{{ 'a' | indent(10 ** 9) }}".to_owned(),
        "{{ ('x' * 1000000).replace('x', 'x' * 1000000) }}".to_owned(),
        "{{ ('x' * 1000000).join('x' * 1000000) }}".to_owned(),
        "{{ [1] | batch(10 ** 9, 0) | list }}".to_owned(),
        "{{ [1] | slice(10 ** 9) | list }}".to_owned(),
    ];
    for source in limited {
        let fault = rendered(&source, &context).unwrap_err();
        assert!(matches!(fault, Fault::Limit(_)), "{source}: {fault:?}");
    }
    let refused = [
        format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(10_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(10_000)),
        format!("{{{{ {}1 }}}}", "1 if 1 else ".repeat(10_000)),
        "{% if 1 %}".repeat(10_000),
        "{% macro f() %}".repeat(10_000),
        grow("1", "[ns.s]", "ns.s"),
        grow("1", "cycler(ns.s)", "1"),
        grow("1", "joiner(ns.s)", "1"),
        "{{ '%1000000000d' % 1 }}".to_owned(),
        "{{ '{:>1000000000}'.format('a') }}".to_owned(),
        "{{ range(10 ** 30) }}".to_owned(),
        "{{ 10 ** 10 ** 10 }}".to_owned(),
        "{{ [1] | tojson(indent=10 ** 9) }}".to_owned(),
    ];
    for source in refused {
        let fault = rendered(&source, &context).unwrap_err();
        assert!(!matches!(fault, Fault::Raised(_)), "{fault:?}");
    }
    // What is long but honest passes.
    for source in [
        format!("{{{{ {}1 }}}}", "1 + ".repeat(10_000)),
        format!("{{{{ 'a'{} }}}}", "|upper".repeat(10_000)),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(1000)),
        "{% set ns = namespace(s=1) %}{% for i in range(999) %}{% set ns.s = namespace(a=ns.s) %}{% endfor %}ok"
            .to_owned(),
    ] {
        rendered(&source, &context).unwrap();
    }
}

/// Nested lists that share their parts print to more than there is; printing and comparing them ends.
#[test]
fn shared_parts_are_counted_each_time() {
    let context = Context::new();
    for end in ["ns.s", "ns.s | tojson", "ns.s == ns.t", "ns.s < ns.t", "ns.s | pprint"] {
        let source = format!(
            "{{% set ns = namespace(s=[1], t=[1]) %}}{{% for i in range(100) %}}{{% set ns.s = [ns.s, ns.s] %}}\
             {{% set ns.t = [ns.t, ns.t] %}}{{% endfor %}}{{{{ {end} }}}}"
        );
        assert!(matches!(rendered(&source, &context).unwrap_err(), Fault::Limit(_)), "{end}");
    }
}

#[test]
fn limits_grow_with_the_conversation() {
    // Every message walks through the whole conversation.
    let source = "{% for m in messages %}{% for n in messages %}{% if n == m %}{% endif %}{% endfor %}{% endfor %}ok";
    let messages = vec![serde_json::json!({"role": "user", "content": "some words"}); 100];
    let context = context(&serde_json::json!({ "messages": messages }));
    let template = compile(source).unwrap();
    assert!(render(&template, &context, None, &Limits::new(0), DAY).is_ok());
    let endless = compile("{% for i in range(1100) %}{% for j in range(1100) %}{% endfor %}{% endfor %}").unwrap();
    assert!(render(&endless, &context, None, &Limits::new(0), DAY).is_err());
    assert!(render(&endless, &context, None, &Limits::new(100 * 40), DAY).is_ok());
}

#[test]
fn failures_name_their_line() {
    let template = compile("a\n{% if true %}\n{{ 1 + 'x' }}\n{% endif %}").unwrap();
    let (fault, line) = render(&template, &Context::new(), None, &Limits::new(0), DAY).unwrap_err();
    assert_eq!((fault.text(), line), ("TypeError: unsupported operand type(s) for +: 'int' and 'str'", 3));
    assert_eq!(compile("a\n{% nosuch %}").unwrap_err().text(), "line 2: unknown tag `nosuch`");
}
