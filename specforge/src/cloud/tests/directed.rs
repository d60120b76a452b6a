//! Faults one at a time, where it matters exactly what the other side says.

use super::super::protocol::{Address, Code, Draft, Node, Refusal, Resume, Verdict};
use super::*;
use crate::cloud::Digest;

const LINK: LinkId = LinkId(1);

/// The first of some requests whose answer is not short.
fn long(temperature: f64) -> Asked {
    let target = target(1);
    let asked =
        |key: u32| Asked { prompt: vec![key % 32, 9, 14], max_new_tokens: 12, temperature, key: u64::from(key) };
    (0..).map(asked).find(|asked| asked.alone(&target).0.len() >= 8).unwrap()
}

fn asked() -> Asked {
    long(1.0)
}

/// Everything that the cloud has to say after it has done its work.
fn answers(cloud: &mut Cloud<'_>) -> Vec<CloudMessage> {
    while cloud.work(Duration::ZERO) {}
    std::iter::from_fn(|| cloud.take()).map(|(_, message)| message).collect()
}

fn only(cloud: &mut Cloud<'_>) -> CloudMessage {
    let mut all = answers(cloud);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

fn refusal(cloud: &mut Cloud<'_>) -> Refusal {
    match only(cloud) {
        CloudMessage::Error(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

fn verdict(cloud: &mut Cloud<'_>) -> Verdict {
    match only(cloud) {
        CloudMessage::Verdict(verdict) => verdict,
        other => panic!("{other:?}"),
    }
}

/// An edge with a session, at its first draft.
fn opened<'d>(cloud: &mut Cloud<'_>, asked: &Asked, drafter: Box<dyn Drafter + 'd>) -> Edge<'d> {
    let mut edge = Edge::new(asked.request(1, false), drafter);
    edge.connected();
    cloud.receive(LINK, edge.next_message().unwrap().unwrap(), Duration::ZERO);
    edge.received(only(cloud)).unwrap();
    assert_eq!(edge.state(), super::super::State::Drafting);
    edge
}

/// A draft behind what an edge has.
fn draft(edge: &Edge<'_>, round: u64, nodes: &[(u32, u32)]) -> Draft {
    let base = edge.committed();
    Draft {
        address: edge.address().unwrap(),
        round,
        base_length: base.len() as u64,
        base_digest: Digest::of(base).bits(),
        sure: Vec::new(),
        nodes: nodes.iter().map(|&(parent, token)| Node { parent, token }).collect(),
    }
}

/// Runs an edge to its end on a sound line.
fn finish(cloud: &mut Cloud<'_>, edge: &mut Edge<'_>, link: LinkId) {
    while let Some(message) = edge.next_message().unwrap() {
        cloud.receive(link, message, Duration::ZERO);
        answers(cloud).into_iter().for_each(|message| edge.received(message).unwrap());
    }
    assert_eq!(edge.state(), super::super::State::Done);
}

#[test]
fn malformed_trees_are_refused_by_name_and_the_session_goes_on() {
    let target = target(1);
    let (asked, mut cloud) = (asked(), cloud(&target, settings(), 1));
    let mut edge = opened(&mut cloud, &asked, Box::new(Plain));
    let session = edge.address().unwrap().session;
    let before = cloud.sequence(session).unwrap().tokens().to_vec();
    let many: Vec<(u32, u32)> = (0..25).map(|node| (node, 1)).collect();
    for (round, (nodes, problem)) in (1..).zip([
        (&[(0, 1), (3, 2), (2, 3)][..], "its own ancestor"),
        (&[(2, 1), (0, 2)], "comes after it"),
        (&[(7, 1)], "the last one is 1"),
        (&[(0, 32)], "vocabulary has 32"),
        (&[(0, 1), (0, 1)], "both guess token 1"),
        (&many, "at most 24"),
    ]) {
        cloud.receive(LINK, EdgeMessage::Draft(draft(&edge, round, nodes)), Duration::ZERO);
        let refusal = refusal(&mut cloud);
        assert_eq!((refusal.code, refusal.of), (Code::BadTree, round));
        assert!(refusal.message.contains(problem), "{}", refusal.message);
        assert_eq!(cloud.sequence(session).unwrap().tokens(), before);
    }
    finish(&mut cloud, &mut edge, LINK);
    assert_eq!((edge.answer(), edge.finish()), (&asked.alone(&target).0[..], Some(asked.alone(&target).1)));
    assert_eq!(cloud.sessions(), 0, "a closed session is gone");
}

#[test]
fn what_is_no_request_for_this_target_is_refused_at_once() {
    let target = target(1);
    let mut cloud = cloud(&target, settings(), 1);
    let good = asked().request(1, false);
    let sampled = |policy| Choice { policy, ..asked().choice() };
    let cases: [(EdgeRequest, Code, &str); 8] = [
        (EdgeRequest { tokenizer_hash: "other".to_owned(), ..good.clone() }, Code::Tokenizer, "another tokenizer"),
        (EdgeRequest { vocab_size: 33, ..good.clone() }, Code::Tokenizer, "the target has 32"),
        (EdgeRequest { choice: sampled(Policy::Maximal { seed: 1 }), ..good.clone() }, Code::Policy, "`maximal`"),
        (EdgeRequest { prompt: Vec::new(), ..good.clone() }, Code::Request, "empty"),
        (EdgeRequest { prompt: vec![1; 64], ..good.clone() }, Code::Request, "context of 64"),
        (EdgeRequest { prompt: vec![1, 40], ..good.clone() }, Code::Request, "token 40"),
        (EdgeRequest { max_new_tokens: 0, ..good.clone() }, Code::Request, "max_new_tokens"),
        (
            EdgeRequest {
                choice: Choice { processors: Processors::at_temperature(-1.0), ..good.choice },
                ..good.clone()
            },
            Code::Request,
            "temperature",
        ),
    ];
    for (request, code, problem) in cases {
        let mut edge = Edge::new(request, Box::new(Plain));
        edge.connected();
        cloud.receive(LINK, edge.next_message().unwrap().unwrap(), Duration::ZERO);
        let refusal = refusal(&mut cloud);
        assert_eq!(refusal.code, code, "{}", refusal.message);
        assert!(refusal.message.contains(problem), "{}", refusal.message);
        let error = edge.received(CloudMessage::Error(refusal)).unwrap_err().to_string();
        assert!(error.contains("the cloud refuses"), "{error}");
    }
    let mut edge = Edge::new(good, Box::new(Plain));
    edge.connected();
    let Some(EdgeMessage::Open(open)) = edge.next_message().unwrap() else { panic!() };
    for (change, code) in [
        (super::super::protocol::Open { version: 9, ..(*open).clone() }, Code::Version),
        (super::super::protocol::Open { tail: vec![31, 31, 31], ..(*open).clone() }, Code::Diverged),
        (super::super::protocol::Open { tail: vec![1; 13], ..(*open).clone() }, Code::Request),
    ] {
        cloud.receive(LINK, EdgeMessage::Open(Box::new(change)), Duration::ZERO);
        assert_eq!(refusal(&mut cloud).code, code);
    }
    assert_eq!(cloud.sessions(), 0);
}

#[test]
fn a_round_is_verified_once_however_often_it_arrives() {
    let target = target(1);
    let (asked, mut cloud) = (asked(), cloud(&target, settings(), 1));
    let want = asked.alone(&target).0;
    let edge = opened(&mut cloud, &asked, Box::new(Plain));
    let session = edge.address().unwrap().session;
    let first = draft(&edge, 1, &[(0, want[1]), (1, want[2]), (0, (want[1] + 1) % 32)]);
    // Twice before the pass, and twice behind it.
    cloud.receive(LINK, EdgeMessage::Draft(first.clone()), Duration::ZERO);
    cloud.receive(LINK, EdgeMessage::Draft(first.clone()), Duration::ZERO);
    let said = verdict(&mut cloud);
    assert_eq!((said.path.as_slice(), said.tokens.as_slice()), (&[0, 1, 2][..], &want[1..4]));
    let tokens = cloud.sequence(session).unwrap().tokens().to_vec();
    for _ in 0..2 {
        cloud.receive(LINK, EdgeMessage::Draft(first.clone()), Duration::ZERO);
        assert!(!cloud.has_work());
        assert_eq!(verdict(&mut cloud), said);
    }
    // The number is taken.
    let other = Draft { nodes: Vec::new(), ..first.clone() };
    cloud.receive(LINK, EdgeMessage::Draft(other.clone()), Duration::ZERO);
    assert_eq!(refusal(&mut cloud).code, Code::RoundReused);
    // Another round on what is not the newest: what was missed comes along.
    cloud.receive(LINK, EdgeMessage::Draft(Draft { round: 2, ..other.clone() }), Duration::ZERO);
    let stale = refusal(&mut cloud);
    assert_eq!((stale.code, stale.missed), (Code::StaleBase, vec![said]));
    // On what never was.
    for wrong in [Draft { base_digest: 1, ..other.clone() }, Draft { base_length: 99, ..other.clone() }] {
        cloud.receive(LINK, EdgeMessage::Draft(Draft { round: 3, ..wrong }), Duration::ZERO);
        assert_eq!(refusal(&mut cloud).code, Code::Diverged);
    }
    assert_eq!(cloud.sequence(session).unwrap().tokens(), tokens);
}

/// The answer ends in the middle of a path, at its stop token or at the last token that is wanted.
#[test]
fn an_answer_ends_inside_a_tree() {
    let target = target(1);
    let mut ends = Vec::new();
    for key in 0..40 {
        let asked = Asked { key, max_new_tokens: 9, ..asked() };
        let want = asked.alone(&target);
        let mut cloud = cloud(&target, settings(), 1);
        let mut edge = opened_or_ended(&mut cloud, &asked, &want.0);
        finish(&mut cloud, &mut edge, LINK);
        assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)));
        ends.push((want.1, edge.rounds().len()));
    }
    assert!(ends.contains(&(Finish::Stop, 1)) && ends.contains(&(Finish::Length, 1)), "{ends:?}");
}

/// Guesses the whole answer and more behind its end.
struct Beyond(Vec<u32>);

impl Drafter for Beyond {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let rest = self.0.get(rows[0].tokens.len()..).unwrap_or_default();
        let tree = TokenTree::chain(last(rows[0].tokens), &[rest, &[1, 2, 3]].concat());
        let scores = vec![0.0; tree.len()];
        Ok(vec![Proposal::picked(tree, scores)])
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}
}

fn opened_or_ended(cloud: &mut Cloud<'_>, asked: &Asked, answer: &[u32]) -> Edge<'static> {
    let text = [&asked.prompt[..], answer].concat();
    let mut edge = Edge::new(asked.request(1, false), Box::new(Beyond(text)));
    edge.connected();
    cloud.receive(LINK, edge.next_message().unwrap().unwrap(), Duration::ZERO);
    edge.received(only(cloud)).unwrap();
    edge
}

/// A line that is cut at one message: before it is sent, after, or before its answer is read.
struct CutAt<'n, 't> {
    network: &'n mut Network<'t>,
    at: u64,
    count: u64,
}

impl CutAt<'_, '_> {
    fn now(&mut self) -> bool {
        self.count += 1;
        if self.count == self.at {
            self.network.cut();
        }
        self.count == self.at
    }
}

impl Link for CutAt<'_, '_> {
    fn connect(&mut self) -> Result<(), String> {
        self.network.connect()
    }

    fn send(&mut self, message: EdgeMessage) -> Result<(), String> {
        self.now();
        let sent = self.network.send(message);
        self.now();
        sent
    }

    fn receive(&mut self, patience: Duration) -> Received {
        if self.now() { Received::Closed("cut".to_owned()) } else { self.network.receive(patience) }
    }

    fn pause(&mut self, time: Duration) {
        self.network.pause(time);
    }

    fn now(&self) -> Duration {
        self.network.now
    }
}

#[test]
fn a_connection_may_be_cut_in_every_state() {
    let target = target(1);
    let asked = asked();
    let want = asked.alone(&target);
    let (mut at, mut resumed, mut reopened) = (1, 0, 0);
    loop {
        let mut network = Network::new(&target, settings(), Rates::default(), at);
        let mut edge = Edge::new(asked.request(1, true), Box::new(Oracle::new(&asked, &want.0, at, 3)));
        let mut line = CutAt { network: &mut network, at, count: 0 };
        drive(&mut edge, &mut line, &waits(), &|| false, &mut |_| Ok(())).unwrap();
        assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)), "cut at {at}");
        resumed += edge.sessions().1;
        reopened += edge.sessions().0 - 1;
        if line.count < at {
            break;
        }
        at += 1;
    }
    assert!(at > 10 && resumed > 5, "{at} places, resumed {resumed} times, opened anew {reopened} times");
}

#[test]
fn of_two_edges_on_one_session_the_newer_has_it() {
    let target = target(1);
    let (asked, mut cloud) = (asked(), cloud(&target, settings(), 1));
    let want = asked.alone(&target);
    let mut first = opened(&mut cloud, &asked, Box::new(Plain));
    let (address, second_link) = (first.address().unwrap(), LinkId(2));
    // Who does not know the newest epoch cannot take it.
    let wrong = Resume { address: Address { epoch: 5, ..address }, edge: 2, committed_length: 3, digest: 0 };
    cloud.receive(second_link, EdgeMessage::Resume(wrong), Duration::ZERO);
    assert_eq!(refusal(&mut cloud).code, Code::TakenOver);
    let answer = first.answer().to_vec();
    let mut second = Edge::taking_over(asked.request(2, false), Box::new(Plain), address, &answer);
    second.connected();
    cloud.receive(second_link, second.next_message().unwrap().unwrap(), Duration::ZERO);
    let mut told = 0;
    while cloud.work(Duration::ZERO) {}
    while let Some((link, message)) = cloud.take() {
        match link {
            LINK => {
                told += 1;
                assert!(first.received(message).unwrap_err().to_string().contains("TakenOver"));
            }
            _ => second.received(message).unwrap(),
        }
    }
    assert_eq!(told, 1);
    // The first one is not heard any more, on its old connection or on a new one.
    let late = EdgeMessage::Draft(draft(&first, 1, &[]));
    cloud.receive(LINK, late, Duration::ZERO);
    assert_eq!(refusal(&mut cloud).code, Code::TakenOver);
    cloud.receive(LINK, EdgeMessage::Cancel(address), Duration::ZERO);
    let back = Resume { address, edge: 1, committed_length: 3, digest: Digest::of(&asked.prompt).bits() };
    cloud.receive(LinkId(3), EdgeMessage::Resume(back), Duration::ZERO);
    assert_eq!(refusal(&mut cloud).code, Code::TakenOver);
    finish(&mut cloud, &mut second, second_link);
    assert_eq!((second.answer(), second.finish()), (&want.0[..], Some(want.1)));
}

#[test]
fn a_cancelled_draft_is_not_verified_and_a_verdict_behind_a_cancel_is_not_taken() {
    let target = target(1);
    let (asked, mut cloud) = (asked(), cloud(&target, settings(), 1));
    let mut edge = opened(&mut cloud, &asked, Box::new(Plain));
    cloud.receive(LINK, edge.next_message().unwrap().unwrap(), Duration::ZERO);
    assert!(cloud.has_work());
    cloud.receive(LINK, edge.cancel().unwrap(), Duration::ZERO);
    assert!(!cloud.has_work() && cloud.sessions() == 0 && answers(&mut cloud).is_empty());
    // While the pass runs: the verdict is on its way, and the session is gone behind it.
    let mut edge = opened(&mut cloud, &asked, Box::new(Plain));
    cloud.receive(LINK, edge.next_message().unwrap().unwrap(), Duration::ZERO);
    let said = verdict(&mut cloud);
    let known = edge.answer().to_vec();
    cloud.receive(LINK, edge.cancel().unwrap(), Duration::ZERO);
    edge.received(CloudMessage::Verdict(said)).unwrap();
    assert_eq!((edge.answer(), cloud.sessions()), (&known[..], 0));
}

#[test]
fn sessions_end_with_their_lease_and_make_room_where_nobody_holds_them() {
    let target = target(1);
    let asked = asked();
    let two = CloudSettings { max_sessions: 2, ..settings() };
    let mut cloud = cloud(&target, two.clone(), 1);
    let open = |cloud: &mut Cloud<'_>, link: u64, now: Duration| {
        let mut edge = Edge::new(asked.request(link, false), Box::new(Plain) as Box<dyn Drafter>);
        edge.connected();
        cloud.receive(LinkId(link), edge.next_message().unwrap().unwrap(), now);
        cloud.work(now);
        (edge, only(cloud))
    };
    let (mut first, message) = open(&mut cloud, 1, Duration::ZERO);
    first.received(message).unwrap();
    let (_, message) = open(&mut cloud, 2, MS);
    assert!(matches!(message, CloudMessage::Opened(_)));
    // Both are held.
    let (mut third, message) = open(&mut cloud, 3, 2 * MS);
    assert!(matches!(&message, CloudMessage::Error(refusal) if refusal.code == Code::Busy), "{message:?}");
    third.received(message).unwrap();
    assert_eq!((third.state(), third.troubles()), (super::super::State::ToOpen, (1, true)));
    // The first one's connection is lost: its place is given away, and it opens a session anew where there is room again.
    cloud.closed(LinkId(1));
    first.disconnected("cut").unwrap();
    let (_, message) = open(&mut cloud, 3, 3 * MS);
    assert!(matches!(message, CloudMessage::Opened(_)));
    first.connected();
    cloud.receive(LinkId(4), first.next_message().unwrap().unwrap(), 4 * MS);
    let unknown = refusal(&mut cloud);
    assert_eq!(unknown.code, Code::UnknownSession);
    first.received(CloudMessage::Error(unknown)).unwrap();
    cloud.tick(two.lease + 2 * MS);
    assert_eq!(cloud.sessions(), 1, "one lease is over");
    let told = answers(&mut cloud);
    assert!(matches!(&told[..], [CloudMessage::Error(refusal)] if refusal.code == Code::UnknownSession), "{told:?}");
    finish(&mut cloud, &mut first, LinkId(4));
    assert_eq!(first.answer(), asked.alone(&target).0);
    // Memory counts as well: every session with all that it may grow to.
    let small = CloudSettings { max_tokens: 20, ..settings() };
    let mut cloud = super::cloud(&target, small, 1);
    assert!(matches!(open(&mut cloud, 1, MS).1, CloudMessage::Opened(_)));
    assert!(matches!(open(&mut cloud, 2, MS).1, CloudMessage::Error(refusal) if refusal.code == Code::Busy));
}

/// Where no draft comes the target goes on by itself, and an edge that does not read holds it up.
#[test]
fn progress_without_drafts_waits_for_a_slow_reader() {
    let target = target(1);
    let asked = long(0.0);
    let want = asked.alone(&target);
    let impatient = CloudSettings { progress_after: Some(100 * MS), most_ahead: 3, ..settings() };
    let mut cloud = cloud(&target, impatient, 1);
    let mut edge = opened(&mut cloud, &asked, Box::new(Plain));
    let mut now = Duration::ZERO;
    let mut said = Vec::new();
    for _ in 0..20 {
        now += 150 * MS;
        cloud.tick(now);
        while cloud.work(now) {}
        said.extend(std::iter::from_fn(|| cloud.take()).map(|(_, message)| message));
    }
    assert_eq!(said.len(), 4.min(want.0.len() - 1), "{said:?}");
    assert!(said.iter().all(|said| matches!(said, CloudMessage::Verdict(verdict) if verdict.round == 0)));
    // It reads at last, but the first message was lost.
    let first = edge.next_message().unwrap().unwrap();
    for message in said.into_iter().skip(1) {
        edge.received(message).unwrap();
    }
    cloud.receive(LINK, first, now);
    answers(&mut cloud).into_iter().for_each(|message| edge.received(message).unwrap());
    finish(&mut cloud, &mut edge, LINK);
    assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)));
}

/// What was committed is a session's alone: names are not given twice, and a killed cloud's are unknown to the next.
#[test]
fn a_cloud_that_was_killed_comes_back_to_the_same_answer() {
    let target = target(1);
    let (asked, mut cloud) = (asked(), cloud(&target, settings(), 1));
    let want = asked.alone(&target);
    let mut edge = opened(&mut cloud, &asked, Box::new(Oracle::new(&asked, &want.0, 1, 2)));
    cloud.receive(LINK, edge.next_message().unwrap().unwrap(), Duration::ZERO);
    answers(&mut cloud).into_iter().for_each(|message| edge.received(message).unwrap());
    let before = edge.address().unwrap();
    let mut cloud = super::cloud(&target, settings(), 2);
    edge.disconnected("killed").unwrap();
    edge.connected();
    finish(&mut cloud, &mut edge, LinkId(7));
    assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)));
    assert_eq!(edge.sessions().0, 2);
    let _: SessionId = before.session;
    assert!(edge.address().unwrap().epoch > before.epoch && edge.address().unwrap().session != before.session);
}
