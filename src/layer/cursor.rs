//! A place in a union that follows a walk over another tree, with a bounded number of descriptors.
//!
//! A merged directory costs a descriptor for each layer that has it, so the directories on the way
//! down are kept only while they are few; those let go are looked up again from the root.

use super::stack::{LayerStack, MergedDir, Visible};
use crate::error::Result;
use crate::path::{Name, RelPath};

/// How many descriptors the directories above the current one may cost.
const DESCRIPTORS: usize = 256;

/// Where the walk is, in the union.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    stack: &'a LayerStack,
    /// Directories on the way down, the last of them first let go.
    open: Vec<Step>,
    descriptors: usize,
}

#[derive(Debug)]
struct Step {
    path: RelPath,
    depth: usize,
    /// None where the union has no directory.
    dir: Option<MergedDir>,
}

impl<'a> Cursor<'a> {
    /// At the root of `stack`.
    pub(crate) fn new(stack: &'a LayerStack) -> Self {
        Cursor { stack, open: Vec::new(), descriptors: 0 }
    }

    /// The directory `path` of the union, if it has one. Fastest when paths come in the order of a
    /// walk.
    pub(crate) fn directory(&mut self, path: &RelPath) -> Result<Option<&MergedDir>> {
        while let Some(step) = self.open.last()
            && !path.starts_with(&step.path)
        {
            self.descriptors = self.descriptors.saturating_sub(cost(step));
            self.open.pop();
        }
        if self.open.is_empty() {
            self.push(Step { path: RelPath::ROOT, depth: 0, dir: Some(self.stack.root()?) });
        }
        if self.open.last().is_some_and(|step| step.path != *path) {
            let depth = self.open.last().map_or(0, |step| step.depth);
            for name in path.components().skip(depth) {
                let Some(step) = self.open.last() else { break };
                let dir = match &step.dir {
                    Some(dir) => dir.enter(self.stack, &name)?,
                    None => None,
                };
                let next = Step { path: step.path.join(&name), depth: step.depth + 1, dir };
                self.push(next);
            }
        }
        Ok(self.open.last().and_then(|step| step.dir.as_ref()))
    }

    /// What a listing of `path` told to be in one of its layers; none if no layer is given, or if it
    /// has vanished.
    pub(crate) fn visible(
        &mut self,
        path: &RelPath,
        name: &Name,
        layer: Option<usize>,
    ) -> Result<Option<Visible>> {
        match (layer, layer.map(|_| self.directory(path)).transpose()?.flatten()) {
            (Some(layer), Some(dir)) => dir.visible(name, layer),
            _ => Ok(None),
        }
    }

    fn push(&mut self, step: Step) {
        self.descriptors += cost(&step);
        self.open.push(step);
        while self.descriptors > DESCRIPTORS && self.open.len() > 1 {
            let let_go = self.open.remove(0);
            self.descriptors = self.descriptors.saturating_sub(cost(&let_go));
        }
    }
}

/// Every step costs something, so that their number is bounded too.
fn cost(step: &Step) -> usize {
    step.dir.as_ref().map_or(1, |dir| dir.layers().max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerFormat;
    use crate::layer::stack::Branch;
    use crate::sys::dir::Dir;
    use crate::sys::remove::remove_tree;
    use std::sync::Arc;

    #[test]
    fn depth_and_layers_cost_a_bounded_number_of_descriptors() {
        let tmp = tempfile::tempdir().unwrap();
        let name = Name::new("d").unwrap();
        let root = Dir::open(tmp.path()).unwrap();
        let mut path = RelPath::ROOT;
        let mut dir = root.try_clone().unwrap();
        for _ in 0..400 {
            dir.make_dir(&name, 0o700).unwrap();
            dir = dir.open_dir(&name).unwrap();
            path.push(&name);
        }
        let dir = Arc::new(root.try_clone().unwrap());
        let branch = Branch { dir, format: LayerFormat::Aufs };
        let stack = LayerStack::new(vec![branch; 5]);
        let mut cursor = Cursor::new(&stack);
        while !path.is_root() {
            assert_eq!(cursor.directory(&path).unwrap().unwrap().layers(), 5);
            let open: usize = cursor.open.iter().map(cost).sum();
            assert!(open <= DESCRIPTORS && open == cursor.descriptors, "{open}");
            path.pop();
        }
        let missing = RelPath::new("d/none/d").unwrap();
        assert!(cursor.directory(&missing).unwrap().is_none());
        assert!(cursor.directory(&RelPath::ROOT).unwrap().is_some());
        remove_tree(&root, &name, &mut || Ok(())).unwrap();
    }
}
