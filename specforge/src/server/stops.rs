//! Strings that end an answer, found in text that arrives in pieces.

/// Looks for stop strings. What may be the beginning of one is held back until it is known.
#[derive(Debug, Clone, Default)]
pub struct Stops {
    wanted: Vec<String>,
    held: String,
}

impl Stops {
    /// Looks for these, none of which is empty.
    pub fn new(wanted: Vec<String>) -> Self {
        Self { wanted, held: String::new() }
    }

    /// Takes text. Gives what is certain to be part of the answer, and whether a stop string was found behind it: then the
    /// answer is over, and the string itself and what follows are not part of it.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.wanted.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        if let Some(at) = self.wanted.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let held = std::mem::take(&mut self.held);
        let beginning = |at: usize| self.wanted.iter().any(|stop| stop.starts_with(&held[at..]));
        let certain = held.char_indices().map(|(at, _)| at).find(|&at| beginning(at)).unwrap_or(held.len());
        self.held = held[certain..].to_owned();
        (held[..certain].to_owned(), false)
    }

    /// What was held back, where nothing follows any more.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer's text, and whether it was stopped.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut stops = Stops::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let (certain, stopped) = stops.push(piece);
            text.push_str(&certain);
            if stopped {
                return (text, true);
            }
        }
        (text + &stops.finish(), false)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_only_where_it_is_whole() {
        for (stops, pieces, want) in [
            (&["END"][..], &["a E", "N", "D b"][..], ("a ", true)),
            (&["END"], &["a E", "N", "d b"], ("a ENd b", false)),
            (&["END"], &["a EN"], ("a EN", false)),
            (&["aab"], &["a", "a", "a", "b"], ("a", true)),
            (&["x", "yz"], &["1y", "x"], ("1y", true)),
            (&["bc", "abcd"], &["abc"], ("a", true)),
            (&["é!"], &["cafe é", "!"], ("cafe ", true)),
            (&["é!"], &["é", "é", "?"], ("éé?", false)),
            (&[], &["a", "b"], ("ab", false)),
            (&["a"], &["a"], ("", true)),
        ] {
            assert_eq!(run(stops, pieces), (want.0.to_owned(), want.1), "{stops:?} in {pieces:?}");
        }
    }

    #[test]
    fn what_cannot_be_part_of_a_stop_string_is_given_at_once() {
        let mut stops = Stops::new(vec!["\n\n".to_owned()]);
        assert_eq!(stops.push("one"), ("one".to_owned(), false));
        assert_eq!(stops.push("\n"), (String::new(), false));
        assert_eq!(stops.push("two\n"), ("\ntwo".to_owned(), false));
        assert_eq!(stops.push("\nthree"), (String::new(), true));
    }
}
