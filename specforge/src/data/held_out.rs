//! Which held-out documents an evaluation reads, where it does not read all: those whose content has the lowest hashes.
//! So the choice depends neither on the order of files nor, but for what joins or leaves at its end, on what else is held
//! out.

use super::cache::TokenCache;

/// Documents in the order of their conversations' hashes; those of one conversation stay together, in their own order.
pub fn by_content(cache: &TokenCache, mut documents: Vec<usize>) -> Vec<usize> {
    documents.sort_by_key(|&document| (cache.conversation_key(document), document));
    documents
}

/// The first documents that together have at most so many tokens, but at least one; all of them where `most` is 0.
pub fn first_tokens<'a>(cache: &TokenCache, documents: &'a [usize], most: usize) -> &'a [usize] {
    if most == 0 {
        return documents;
    }
    let mut tokens = 0;
    let fits = |&&document: &&usize| {
        tokens += cache.length(document);
        tokens <= most
    };
    let count = documents.iter().take_while(fits).count();
    &documents[..count.max(1).min(documents.len())]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::cache::CacheWriter;
    use super::super::report::BuildReport;
    use super::*;

    /// A cache of conversations by their hash and the length of each of their documents.
    fn cache(folder: &Path, conversations: &[(u64, &[usize])]) -> TokenCache {
        let (path, key) = (folder.join("cache"), [1; 32]);
        let mut writer = CacheWriter::create(&path, &path, key).unwrap();
        for (hash, lengths) in conversations {
            for (turn, &length) in lengths.iter().enumerate() {
                let name = format!("{hash}#{turn}");
                writer.add(&name, *hash, &vec![1; length], &vec![1; length]).unwrap();
            }
        }
        writer.finish(&BuildReport::default()).unwrap();
        TokenCache::open(&path, &key).unwrap().0
    }

    fn chosen(conversations: &[(u64, &[usize])], most: usize) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), conversations);
        let order = by_content(&cache, (0..cache.len()).collect());
        first_tokens(&cache, &order, most).iter().map(|&index| cache.document(index).id.to_owned()).collect()
    }

    #[test]
    fn neither_the_order_nor_other_conversations_move_the_choice() {
        let all: [(u64, &[usize]); 4] = [(70, &[5]), (20, &[3, 4]), (90, &[2]), (40, &[6])];
        let first = chosen(&all, 13);
        assert_eq!(first, ["20#0", "20#1", "40#0"]);
        let mut turned = all;
        turned.reverse();
        assert_eq!(chosen(&turned, 13), first);
        // What comes later in the order of hashes changes nothing; what comes before takes the place of the last.
        assert_eq!(chosen(&[&all[..], &[(80, &[9]), (95, &[1])]].concat(), 13), first);
        assert_eq!(chosen(&[&all[..], &[(30, &[2])]].concat(), 13), ["20#0", "20#1", "30#0"]);
    }

    #[test]
    fn a_limit_is_kept_but_for_a_first_document_that_is_longer() {
        let all: [(u64, &[usize]); 3] = [(1, &[5]), (2, &[5]), (3, &[5])];
        assert_eq!([0, 1, 5, 9, 10, 15, 99].map(|most| chosen(&all, most).len()), [3, 1, 1, 1, 2, 3, 3]);
        assert!(chosen(&[], 5).is_empty());
    }
}
