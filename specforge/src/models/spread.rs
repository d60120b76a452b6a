//! Layers of one target on several devices of one process, for a target that is too large for one of them.
//!
//! Layers keep their order, and each device has some that follow each other: hidden states change devices once where one
//! device's layers end. Embedding, last norm and head are not spread. They are where the draft is, which needs both tables
//! beside it: a table elsewhere would be there twice.

use std::ops::Range;

use tch::{Device, Kind};

use crate::device::{self, CudaState};

/// Devices in the order of the layers that go there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spread(Vec<Place>);

/// A device of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Number of the CUDA device.
    number: usize,
    /// Layers that it gets, where somebody says so.
    layers: Option<usize>,
}

/// How texts name devices.
const FORM: &str = "cuda:N, or cuda:N=LAYERS for each";

impl Spread {
    /// Reads `cuda:0` or `cuda:0=20`, which gives that device 20 layers. Looks at no device; an empty list spreads nothing.
    pub fn parse(names: &[String]) -> Result<Self, String> {
        let place = |text: &String| {
            let (name, layers) = match text.split_once('=') {
                Some((name, layers)) => (name, Some(layers.parse().ok().filter(|&layers| layers > 0))),
                None => (text.as_str(), None),
            };
            let number = name.strip_prefix("cuda:").and_then(|number| number.parse().ok());
            match (number, layers) {
                (Some(number), None) => Ok(Place { number, layers: None }),
                (Some(number), Some(Some(layers))) => Ok(Place { number, layers: Some(layers) }),
                _ => Err(format!("expected {FORM}, got `{text}`")),
            }
        };
        let places = names.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        for (index, Place { number, .. }) in places.iter().enumerate() {
            if places[..index].iter().any(|other| other.number == *number) {
                return Err(format!("cuda:{number} is there twice: each device gets its layers once"));
            }
        }
        let counted = places.iter().filter(|place| place.layers.is_some()).count();
        match counted == 0 || counted == places.len() {
            true => Ok(Self(places)),
            false => Err(format!("expected a number of layers for each device or for none, got {}", names.join(","))),
        }
    }

    /// Whether everything stays where it would be.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The device of the last layers; nothing where nothing is spread.
    pub fn last(&self) -> Option<Device> {
        self.0.last().map(|place| Device::Cuda(place.number))
    }

    /// What one of `of` processes of this machine has: they divide the list, in its order.
    pub fn of_process(&self, process: usize, of: usize) -> Result<Self, String> {
        let (count, of) = (self.0.len(), of.max(1));
        if count % of != 0 {
            return Err(format!(
                "{of} processes of this machine divide the list, each needs devices of its own: expected a multiple of \
                 {of} devices, got {count}"
            ));
        }
        let each = count / of;
        Ok(Self(self.0[process * each..(process + 1) * each].to_vec()))
    }

    /// Refuses devices that are not there.
    pub fn check(&self) -> Result<(), String> {
        let Some(most) = self.0.iter().map(|place| place.number).max() else { return Ok(()) };
        match device::cuda() {
            CudaState::Usable(count) if most < *count => Ok(()),
            CudaState::Usable(count) => {
                Err(format!("this machine has {count} CUDA devices, numbered from 0: cuda:{most} is not there"))
            }
            CudaState::Unusable(reason) => Err(format!("CUDA is not usable: {reason}")),
        }
    }

    /// The layers of each device, for layers of so many bytes each. Where nobody says how many layers a device gets, the
    /// fullest one holds as little as can be; `home`, where tables of so many bytes are, takes fewer layers for them.
    pub fn blocks(&self, layers: &[u64], home: (Device, u64)) -> Result<Vec<(Device, Range<usize>)>, String> {
        let places = &self.0;
        if places.len() > layers.len() {
            let (devices, layers) = (places.len(), layers.len());
            return Err(format!("the target has {layers} layers, which is fewer than the {devices} devices"));
        }
        let asked: Option<Vec<usize>> = places.iter().map(|place| place.layers).collect();
        let counts = match asked {
            Some(counts) if counts.iter().sum::<usize>() != layers.len() => {
                let (asked, there) = (counts.iter().sum::<usize>(), layers.len());
                return Err(format!("the target has {there} layers, the devices get {asked}"));
            }
            Some(counts) => counts,
            None => {
                let tables = |place: &Place| if Device::Cuda(place.number) == home.0 { home.1 } else { 0 };
                balanced(layers, &places.iter().map(tables).collect::<Vec<_>>())
            }
        };
        let mut first = 0;
        let block = |(place, count): (&Place, usize)| {
            first += count;
            (Device::Cuda(place.number), first - count..first)
        };
        Ok(places.iter().zip(counts).map(block).collect())
    }
}

/// How many layers each device gets, one at least, so that the fullest one holds the fewest bytes; `before` are bytes that
/// devices hold in any case.
fn balanced(layers: &[u64], before: &[u64]) -> Vec<usize> {
    let sums: Vec<u64> = std::iter::once(0)
        .chain(layers.iter().scan(0u64, |sum, &bytes| {
            *sum = sum.saturating_add(bytes);
            Some(*sum)
        }))
        .collect();
    // fullest[end]: of the devices so far, holding the first `end` layers; cuts[device][end]: where the device's own begin.
    let mut fullest: Vec<Option<u64>> = vec![None; layers.len() + 1];
    fullest[0] = Some(0);
    let mut cuts = Vec::new();
    for &tables in before {
        let mut next = vec![None; layers.len() + 1];
        let mut cut = vec![0; layers.len() + 1];
        for end in 1..=layers.len() {
            for begin in 0..end {
                let Some(so_far) = fullest[begin] else { continue };
                let held = so_far.max(tables.saturating_add(sums[end] - sums[begin]));
                if next[end].is_none_or(|best| held < best) {
                    (next[end], cut[end]) = (Some(held), begin);
                }
            }
        }
        fullest = next;
        cuts.push(cut);
    }
    let (mut end, mut counts) = (layers.len(), Vec::new());
    for cut in cuts.iter().rev() {
        counts.push(end - cut[end]);
        end = cut[end];
    }
    counts.reverse();
    counts
}

/// Bytes of each layer of a model of these tensors, and of everything beside the layers, in elements of this kind.
pub fn bytes(tensors: &[(String, Vec<i64>)], layers: usize, kind: Kind) -> (Vec<u64>, u64) {
    let (mut of_layers, mut beside) = (vec![0; layers], 0);
    for (name, shape) in tensors {
        let bytes = shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
        match layer_of(name).and_then(|layer| of_layers.get_mut(layer)) {
            Some(layer) => *layer += bytes,
            None => beside += bytes,
        }
    }
    (of_layers, beside)
}

/// Number of the layer that a tensor belongs to by its name, which is `....layers.NUMBER....` in Hugging Face's files, or
/// `....blocks.NUMBER....`.
pub fn layer_of(name: &str) -> Option<usize> {
    let mut words = name.split('.').skip_while(|word| !matches!(*word, "layers" | "blocks")).skip(1);
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(names: &[&str]) -> Result<Spread, String> {
        Spread::parse(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_tensor_names_its_layer() {
        let names = ["model.layers.12.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "layers.x.weight"];
        assert_eq!(names.map(layer_of), [Some(12), None, None, None]);
        let tensors = names.map(|name| (name.replace("12", "1"), vec![2, 3]));
        assert_eq!(bytes(&tensors, 2, Kind::Half), (vec![0, 12], 36));
    }

    #[test]
    fn lists_that_say_nothing_sensible_are_refused() {
        for (names, word) in [
            (&["cpu", "cuda:0"][..], "`cpu`"),
            (&["cuda"], "`cuda`"),
            (&["cuda:0", "cuda:00"], "twice"),
            (&["cuda:0=3", "cuda:1"], "for each device or for none"),
            (&["cuda:0=0"], "`cuda:0=0`"),
            (&["cuda:0=x"], "`cuda:0=x`"),
        ] {
            let problem = spread(names).unwrap_err();
            assert!(problem.contains(word), "{names:?}: {problem}");
        }
        assert!(spread(&[]).unwrap().is_empty());
        let absent = spread(&["cuda:0", "cuda:77"]).unwrap();
        assert_eq!(absent.last(), Some(Device::Cuda(77)));
        assert!(absent.check().is_err());
        assert!(absent.blocks(&[1], (Device::Cpu, 0)).unwrap_err().contains("has 1 layers"));
    }

    #[test]
    fn processes_divide_the_list() {
        let four = spread(&["cuda:0", "cuda:1", "cuda:2", "cuda:3"]).unwrap();
        assert_eq!(four.of_process(1, 2).unwrap(), spread(&["cuda:2", "cuda:3"]).unwrap());
        assert_eq!(four.of_process(0, 1).unwrap(), four);
        assert!(four.of_process(0, 3).unwrap_err().contains("multiple of 3"));
    }

    #[test]
    fn the_fullest_device_holds_as_little_as_can_be() {
        let counts = |names: &[&str], layers: &[u64], home: (usize, u64)| -> Result<Vec<usize>, String> {
            let blocks = spread(names)?.blocks(layers, (Device::Cuda(home.0), home.1))?;
            assert!(blocks.windows(2).all(|pair| pair[0].1.end == pair[1].1.start));
            Ok(blocks.into_iter().map(|(_, layers)| layers.len()).collect())
        };
        let two = &["cuda:0", "cuda:1"];
        assert_eq!(counts(two, &[5; 6], (7, 0)), Ok(vec![3, 3]));
        // Tables take the room of two layers; where they are more than all layers, one layer still goes there.
        assert_eq!(counts(two, &[5; 6], (1, 10)), Ok(vec![4, 2]));
        assert_eq!(counts(two, &[5; 6], (1, 1000)), Ok(vec![5, 1]));
        assert_eq!(counts(two, &[1, 1, 1, 9], (7, 0)), Ok(vec![3, 1]));
        assert_eq!(counts(&["cuda:1", "cuda:0", "cuda:4"], &[2, 9, 2, 2, 4], (7, 0)).unwrap().iter().sum::<usize>(), 5);
        assert_eq!(counts(&["cuda:0=1", "cuda:1=5"], &[5; 6], (1, 10)), Ok(vec![1, 5]));
        assert!(counts(&["cuda:0=1", "cuda:1=4"], &[5; 6], (1, 10)).unwrap_err().contains("get 5"));
        assert_eq!(counts(&["cuda:3"], &[5; 6], (3, 10)), Ok(vec![6]));
    }
}
