//! Random schedules of faults. `SPECFORGE_FAULT_SCHEDULES=N` runs more of them.

use super::*;

/// Schedules that a quick run has.
const QUICK: u64 = 1000;

/// What goes wrong in a schedule: all of it a little, or one thing often.
fn rates(seed: u64, dice: &mut dyn FnMut() -> u64) -> Rates {
    let often = 60 + dice() % 120;
    match seed % 9 {
        0 => Rates { lost: often, ..Rates::default() },
        1 => Rates { doubled: 400, late: 300, ..Rates::default() },
        2 => Rates { late: 400, lost: 40, ..Rates::default() },
        3 => Rates { cut: often, ..Rates::default() },
        4 => Rates { cloud_killed: often / 2, ..Rates::default() },
        5 => Rates { edge_killed: often, cut: 20, ..Rates::default() },
        6 => Rates { evicted: often, ..Rates::default() },
        7 => Rates { slow: 200, lost: 20, ..Rates::default() },
        _ => {
            Rates { lost: 20, doubled: 60, late: 60, cut: 20, cloud_killed: 15, edge_killed: 20, evicted: 20, slow: 30 }
        }
    }
}

#[test]
fn every_schedule_of_faults_ends_in_the_targets_own_tokens_or_a_clear_error() {
    let asked_for = std::env::var("SPECFORGE_FAULT_SCHEDULES").ok().and_then(|count| count.parse().ok());
    let targets = [target(1), target(2)];
    let (mut refused, mut rounds, mut faults) = (0u64, 0, 0);
    let count: u64 = asked_for.unwrap_or(QUICK);
    for seed in 0..count {
        let mut dice = keyed_stream(seed, 14);
        let target = &targets[(dice() % 2) as usize];
        let asked = Asked::of(&mut dice);
        let want = asked.alone(target);
        let most = [4, 12, 24, 30][(dice() % 4) as usize];
        let (ahead, is_lookup) = (dice().is_multiple_of(2), dice().is_multiple_of(5));
        let progress_after = dice().is_multiple_of(4).then_some(120 * MS);
        let settings = CloudSettings { progress_after, ..settings() };
        let mut network = Network::new(target, settings, rates(seed, &mut dice), seed);
        let mut drafter = |life: u64| -> Box<dyn Drafter> {
            match is_lookup {
                true => Box::new(PromptLookup { longest_match: 2, shortest_match: 1, depth: 5, nodes: 12 }),
                false => Box::new(Oracle::new(&asked, &want.0, seed + (life << 40), most)),
            }
        };
        match answer(&mut network, &asked, ahead, &mut drafter) {
            Ok(got) => assert_eq!(got, want, "schedule {seed}: {asked:?}"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("attempts") || text.contains("the cloud refuses"), "schedule {seed}: {text}");
                refused += 1;
            }
        }
        rounds += network.said.iter().filter(|said| matches!(said, CloudMessage::Verdict(_))).count();
        faults += network.link.0 - 1 + network.starts - 1;
    }
    assert!(refused * 100 <= count, "{refused} of {count} schedules ended in an error");
    assert!(rounds as u64 > count && faults > count / 4, "{rounds} rounds, {faults} connections and clouds lost");
}
