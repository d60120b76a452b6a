//! Files that are cut off, changed or foreign are refused, with the line.

use super::*;

#[test]
fn broken_files_are_refused_with_their_line() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    let trace = decode(&models, FORKED).trace(&path, None);
    let text = std::fs::read_to_string(&path).unwrap();
    let lines = text.lines().count();
    let cut = text.trim_end().rsplit_once('\n').unwrap().0.to_owned() + "\n";
    let half = text[..text.len() / 2].to_owned();
    let without = |wanted: &str| {
        let at = text.lines().position(|line| line.contains(wanted)).unwrap();
        let kept: Vec<&str> = text.lines().enumerate().filter(|(line, _)| *line != at).map(|(_, text)| text).collect();
        kept.join("\n") + "\n"
    };
    for (content, message) in [
        (String::new(), "is not a trace".to_owned()),
        ("{\"kind\": \"other\"}\n".to_owned(), "is not a trace".to_owned()),
        (text.replace("\"format\":1", "\"format\":9"), "format 9".to_owned()),
        (cut, format!(":{}: is the last line of a trace that was cut off", lines - 1)),
        (half.clone(), format!(":{}:", half.lines().count())),
        (without("\"record\":\"round\""), "should have".to_owned()),
        (without("\"record\":\"prompt\""), ":2: request 0 has not begun".to_owned()),
        (text.replacen("\"parents\":[0,", "\"parents\":[", 1), "parents and".to_owned()),
        (text.clone() + "{}\n", format!(":{}: stands behind", lines + 1)),
        (text.replacen("\"float64\"", "\"int4\"", 1), "got `int4`".to_owned()),
    ] {
        std::fs::write(&path, content).unwrap();
        let error = Trace::read(&path).unwrap_err();
        assert!(error.to_string().contains(&message) && error.exit_code() == 2, "{error}, not {message}");
    }
    // A row that is not the one recorded.
    std::fs::write(&path, &text).unwrap();
    let rows = folder.path().join("a.trace.rows");
    let mut bytes = std::fs::read(&rows).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    std::fs::write(&rows, &bytes).unwrap();
    let changed = Trace::read(&path).unwrap();
    let token = changed.requests.last().unwrap().tokens.last().unwrap();
    assert!(changed.row(token).unwrap_err().to_string().contains("not the one that was recorded"));
    std::fs::write(&rows, &bytes[..last]).unwrap();
    assert!(Trace::read(&path).unwrap_err().to_string().contains("bytes, as its trace says"));
    drop(trace);
}

#[test]
fn a_recorder_that_does_not_finish_leaves_nothing() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    drop(Recorder::create(&folder.path().join("a"), decode(&models, FORKED).header()).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// What an engine cannot do, since a tree is a type: written into a file by hand.
#[test]
fn trees_that_are_none_are_found() {
    let models = models();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    decode(&models, FORKED).trace(&path, None);
    let text = std::fs::read_to_string(&path).unwrap();
    let change = |record: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut done = false;
        let lines: Vec<String> = text
            .lines()
            .map(|line| {
                let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
                if value["record"] == record && !done && (record != "token" || value["round"] == 2) {
                    done = true;
                    change(&mut value);
                }
                value.to_string()
            })
            .collect();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        structure::check(&Trace::read(&path).unwrap(), Side::A).unwrap()
    };
    let twice = |value: &mut serde_json::Value| value["tokens"][2] = value["tokens"][1].clone();
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let cases: [(&str, Change<'_>, Kind); 7] = [
        ("round", &|value| value["parents"][1] = 3.into(), Kind::Orphan),
        ("round", &|value| value["parents"][1] = 1.into(), Kind::Orphan),
        ("round", &twice, Kind::DuplicateSibling),
        ("round", &|value| value["tokens"][0] = 63.into(), Kind::WrongRoot),
        ("token", &|value| value["depth"] = 2.into(), Kind::WrongPlace),
        ("token", &|value| value["slot"] = 99.into(), Kind::WrongPlace),
        ("end", &|value| value["finish"] = "stop".into(), Kind::WrongEnd),
    ];
    for (record, how, kind) in cases {
        let findings = change(record, how);
        assert!(findings.iter().any(|finding| finding.kind == kind), "{kind:?}: {findings:?}");
    }
}
