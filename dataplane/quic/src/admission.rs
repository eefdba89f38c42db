//! Who is let in, and how much memory each connection may take. No I/O: decisions and counts only.

use std::collections::{HashMap, HashSet};

use pantala_wire::NodeId;

use crate::config::Limits;
use crate::error::CloseReason;

/// Numbers a connection for its lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ConnectionKey(u64);

/// Windows of one connection, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Windows {
    pub(crate) receive: u64,
    pub(crate) send: u64,
}

/// The connections that are open, as `T`, and the nodes that may have none.
#[derive(Debug)]
pub(crate) struct Admission<T> {
    limits: Limits,
    open: HashMap<ConnectionKey, (NodeId, T)>,
    shut_out: HashSet<NodeId>,
    next_key: u64,
}

impl<T> Admission<T> {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            open: HashMap::new(),
            shut_out: HashSet::new(),
            next_key: 0,
        }
    }

    /// Whether there is room for one more connection, besides `pending` handshakes.
    pub(crate) fn has_room(&self, pending: usize) -> bool {
        self.open.len() + pending < self.limits.connections_max
    }

    pub(crate) fn is_shut_out(&self, node: &NodeId) -> bool {
        self.shut_out.contains(node)
    }

    /// Lets a connection with `node` in, or says why not.
    pub(crate) fn admit(&mut self, node: NodeId, entry: T) -> Result<ConnectionKey, CloseReason> {
        if self.is_shut_out(&node) {
            return Err(CloseReason::ShutOut);
        }
        let with_node = self.open.values().filter(|(n, _)| *n == node).count();
        if !self.has_room(0) || with_node >= self.limits.connections_per_node_max {
            return Err(CloseReason::Busy);
        }
        let key = ConnectionKey(self.next_key);
        self.next_key += 1;
        self.open.insert(key, (node, entry));
        Ok(key)
    }

    pub(crate) fn remove(&mut self, key: ConnectionKey) {
        self.open.remove(&key);
    }

    /// Shuts `nodes` out and takes their connections out, for the caller to close.
    pub(crate) fn shut_out(&mut self, nodes: &[NodeId]) -> Vec<T> {
        self.shut_out.extend(nodes);
        let shut_out = &self.shut_out;
        self.open
            .extract_if(|_, (node, _)| shut_out.contains(node))
            .map(|(_, (_, entry))| entry)
            .collect()
    }

    pub(crate) fn readmit(&mut self, nodes: &[NodeId]) {
        for node in nodes {
            self.shut_out.remove(node);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &T> {
        self.open.values().map(|(_, entry)| entry)
    }

    /// What each connection may take now, so that all together stay within the budgets.
    pub(crate) fn windows(&self) -> Windows {
        let share = |budget: u64, most: u64| (budget / self.open.len().max(1) as u64).min(most);
        Windows {
            receive: share(
                self.limits.receive_budget_bytes,
                self.limits.connection_receive_window_bytes,
            ),
            send: share(
                self.limits.send_budget_bytes,
                self.limits.connection_send_window_bytes,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::new([number; 32])
    }

    #[test]
    fn windows_shrink_so_that_all_connections_stay_within_the_budgets() {
        let limits = Limits::default();
        let mut admission = Admission::new(limits.clone());
        for number in 0..limits.connections_max {
            admission.admit(node(number as u8), ()).unwrap();
            let windows = admission.windows();
            let open = admission.len() as u64;
            assert!(windows.receive * open <= limits.receive_budget_bytes);
            assert!(windows.send * open <= limits.send_budget_bytes);
            assert!(windows.receive >= 128 * 1024 && windows.send >= 128 * 1024);
        }
        assert_eq!(admission.admit(node(9), ()), Err(CloseReason::Busy));
        assert!(!admission.has_room(0));
    }

    #[test]
    fn one_node_cannot_take_all_connections() {
        let limits = Limits::default();
        let mut admission = Admission::new(limits.clone());
        let keys: Vec<_> = (0..limits.connections_per_node_max)
            .map(|_| admission.admit(node(1), ()).unwrap())
            .collect();
        assert_eq!(admission.admit(node(1), ()), Err(CloseReason::Busy));
        assert!(admission.admit(node(2), ()).is_ok());
        admission.remove(keys[0]);
        assert!(admission.admit(node(1), ()).is_ok());
    }

    #[test]
    fn a_node_that_is_shut_out_loses_its_connections_until_it_is_readmitted() {
        let mut admission = Admission::new(Limits::default());
        admission.admit(node(1), 'a').unwrap();
        admission.admit(node(2), 'b').unwrap();
        assert_eq!(admission.shut_out(&[node(1)]), vec!['a']);
        assert_eq!(admission.len(), 1);
        assert_eq!(admission.admit(node(1), 'c'), Err(CloseReason::ShutOut));
        assert_eq!(admission.shut_out(&[node(3)]), vec![]);
        admission.readmit(&[node(1)]);
        assert!(admission.admit(node(1), 'd').is_ok());
    }
}
